#!/usr/bin/env bash
# Installs a CUDA 13 compiler from PyPI, for machines without a toolkit, and prints the CUDACXX to build with.
#
# usage: scripts/cuda_from_pypi.sh [13.0|13.2] [directory]
#   export CUDACXX="$(scripts/cuda_from_pypi.sh 13.0)"
set -euo pipefail

version="${1:-13.0}"
root="$(realpath -m "${2:-${XDG_CACHE_HOME:-$HOME/.cache}/broadhead/cuda-$version}")"

# cuda-toolkit pins every part; nvidia-cuda-nvcc alone would pull a ptxas and a front end of different releases.
case "$version" in
  13.0) requirement="cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2" ;;
  13.2) requirement="cuda-toolkit[nvcc,cccl,cudart]==13.2.1" ;;
  *)
    echo "cuda_from_pypi.sh: $version is not offered; accepted: 13.0, 13.2 (PyPI has no nvcc of CUDA 12: install a toolkit)" >&2
    exit 2
    ;;
esac

toolkit="$root/toolkit"
if [[ ! -x "$toolkit/bin/nvcc" ]]; then
  python3 -m pip install --quiet --target "$root/packages" --upgrade "$requirement" >&2
  packages="$root/packages/nvidia/cu13"
  # The wheels lack lib64 and libcudart.so, and nvcc finds its root from the path that it was called by: a real bin/ of
  # links gives it one of ours.
  rm -rf "$toolkit"
  mkdir -p "$toolkit/bin" "$toolkit/lib64"
  ln -s "$packages"/bin/* "$toolkit/bin/"
  ln -s "$packages/include" "$packages/nvvm" "$toolkit/"
  ln -s "$packages"/lib/* "$toolkit/lib64/"
  ln -sf "$packages/lib/libcudart.so.13" "$toolkit/lib64/libcudart.so"
fi
"$toolkit/bin/nvcc" --version >&2
echo "$toolkit/bin/nvcc"
