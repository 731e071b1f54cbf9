#!/usr/bin/env bash
# Installs a CUDA 13 compiler from PyPI, for machines without a toolkit, and prints the CUDACXX to build with.
#
# usage: scripts/cuda_from_pypi.sh [13.0|13.2] [directory]
#   export CUDACXX="$(scripts/cuda_from_pypi.sh 13.0)"
#        scripts/cuda_from_pypi.sh --list      the versions that are offered
# A compiler that cannot compile and link a kernel is not handed out: the script fails with the compiler's words.
set -euo pipefail

# cuda-toolkit pins every part; nvidia-cuda-nvcc alone would pull a ptxas and a front end of different releases.
declare -A requirements=(
  [13.0]="cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2"
  [13.2]="cuda-toolkit[nvcc,cccl,cudart]==13.2.1"
)
offered() { printf '%s\n' "${!requirements[@]}" | sort --version-sort; }

version="${1:-13.0}"
if [[ "$version" == --list ]]; then
  offered
  exit
fi
requirement="${requirements[$version]:-}"
if [[ -z "$requirement" ]]; then
  echo "cuda_from_pypi.sh: $version is not offered; accepted: $(offered | paste --serial --delimiters=' ')" \
    "(PyPI has no nvcc of CUDA 12: install a toolkit)" >&2
  exit 2
fi
root="$(realpath -m "${2:-${XDG_CACHE_HOME:-$HOME/.cache}/broadhead/cuda-$version}")"
toolkit="$root/toolkit"

# The wheels lack lib64 and libcudart.so, and nvcc finds its root from the path that it was called by: a real bin/ of
# links gives it one of ours. nvcc 13.0 looks for libraries in lib64, nvcc 13.2 in lib.
make_toolkit() {
  python3 -m pip install --quiet --target "$root/packages" --upgrade "$requirement" >&2
  local packages="$root/packages/nvidia/cu13"
  rm -rf "$toolkit"
  mkdir -p "$toolkit/bin" "$toolkit/lib64"
  ln -s "$packages"/bin/* "$toolkit/bin/"
  ln -s "$packages/include" "$packages/nvvm" "$toolkit/"
  ln -s "$packages"/lib/* "$toolkit/lib64/"
  ln -sf "$packages/lib/libcudart.so.13" "$toolkit/lib64/libcudart.so"
  ln -s lib64 "$toolkit/lib"
}

# Compiles a kernel for one architecture and links it with the static run-time, as the kernel libraries are.
try_compiler() {
  local probe
  probe="$(mktemp -d)"
  printf '%s\n' '__global__ void kernel(int* x) { *x = 1; }' \
    'int main() { kernel<<<1, 1>>>(nullptr); return cudaGetLastError() == cudaSuccess; }' >"$probe/probe.cu"
  local status=0
  "$toolkit/bin/nvcc" -arch=sm_90 -o "$probe/probe" "$probe/probe.cu" >"$probe/log" 2>&1 || status=$?
  if ((status)); then
    echo "cuda_from_pypi.sh: $toolkit/bin/nvcc cannot compile and link a kernel; remove $root to install it anew:" >&2
    cat "$probe/log" >&2
  fi
  rm -rf "$probe"
  return "$status"
}

# A folder that an interrupted or an older run left is made anew, too.
if [[ ! -x "$toolkit/bin/nvcc" || ! -e "$toolkit/lib" ]]; then
  make_toolkit
fi
try_compiler
"$toolkit/bin/nvcc" --version >&2
echo "$toolkit/bin/nvcc"
