#!/usr/bin/env bash
# Everything that needs a GPU, from an installed wheel: tests, compute-sanitizer, stress, the demo, benchmarks.
#
# usage: scripts/gpu_check.sh OUT [STAGE...]
#   OUT     a folder for logs and results
#   STAGE   fast full memcheck racecheck synccheck stress demo gemma4 bench; default: all but stress.
#           `bench` takes BENCH_ARGS and BENCH_AREAS; `stress` STRESS_CALLS, the random calls of each of its tests, and
#           STRESS_REPLAYS, the replays of each graph; the sanitizer's stages SANITIZER_SELECT, a `-k` expression over
#           the curated set ("sm90").
# Environment: BROADHEAD_KERNEL_DIR (kernel libraries built before) or BROADHEAD_CUDA_ARCHS, as for pip install.
# The current Python must have torch, pybind11, scikit-build-core, pytest with pytest-xdist; demo and bench their extras.
set -euo pipefail
cd "$(dirname "$0")/.."
out="$(mkdir -p "$1" && cd "$1" && pwd)"
shift
stages=("$@")
[[ ${#stages[@]} -gt 0 ]] || stages=(fast full memcheck racecheck synccheck demo gemma4 bench)

site="$(mktemp -d)"
python3 -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$site/wheel" .
python3 -m pip install --quiet --no-deps --no-index --target "$site/lib" "$site"/wheel/*.whl
export PYTHONPATH="$site/lib${PYTHONPATH:+:$PYTHONPATH}"
root="$PWD"
cd "$site" # nothing may come from the source tree
python3 -c "import broadhead, torch; print('broadhead', broadhead.__version__, broadhead.__file__); print('torch', torch.__version__, torch.cuda.get_device_name())"

failed=0
for stage in "${stages[@]}"; do
  started=$SECONDS
  log="$out/$stage.log"
  case "$stage" in
    fast) python3 -m pytest "$root/tests/gpu" -c "$root/pyproject.toml" -m "gpu and not full" -n 8 -q -p no:cacheprovider >"$log" 2>&1 ;;
    full) python3 -m pytest "$root/tests/gpu" -c "$root/pyproject.toml" -m gpu -n 14 -q -p no:cacheprovider >"$log" 2>&1 ;;
    memcheck)
      check=(compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all python3 -m pytest "$root/tests/gpu"
        -c "$root/pyproject.toml" -m curated -q -p no:cacheprovider --timeout 0)
      # Without torch's caching every tensor is an allocation of its own; graph capture needs the caching.
      select="${SANITIZER_SELECT:-test}"
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" -k "($select) and not graph" >"$log" 2>&1 &&
        if [[ -z "${SANITIZER_SELECT:-}" ]]; then "${check[@]}" -k graph >>"$log" 2>&1; fi
      ;;
    racecheck | synccheck)
      # Our kernels alone: torch's matrix multiplications would take most of the time.
      compute-sanitizer --tool "$stage" --kernel-name kns=broadhead --error-exitcode 9 --target-processes all \
        python3 -m pytest "$root/tests/gpu" -c "$root/pyproject.toml" -m curated -k "${SANITIZER_SELECT:-test}" -q \
        -p no:cacheprovider --timeout 0 >"$log" 2>&1
      ;;
    stress)
      BROADHEAD_FUZZ_CALLS="${STRESS_CALLS:-500}" BROADHEAD_REPLAYS="${STRESS_REPLAYS:-20000}" \
        python3 -m pytest "$root/tests/gpu/test_gpu_fuzz.py" "$root/tests/gpu/test_gpu_replays.py" \
        -c "$root/pyproject.toml" -n 14 -q -p no:cacheprovider --timeout 0 >"$log" 2>&1
      ;;
    demo) python3 -m broadhead demo >"$log" 2>&1 ;;
    gemma4) python3 -m broadhead demo --architecture gemma4 >"$log" 2>&1 ;;
    bench)
      for area in ${BENCH_AREAS:-forward decode host}; do
        # shellcheck disable=SC2086
        python3 -m broadhead.bench "$area" --out "$out/results.json" ${BENCH_ARGS:-} || exit 1
      done >"$log" 2>&1
      ;;
    *) echo "gpu_check.sh: unknown stage $stage" >&2; exit 2 ;;
  esac && status=passed || { status="FAILED ($?)"; failed=1; }
  printf '== %s: %s in %d s\n' "$stage" "$status" $((SECONDS - started))
  tail -n "${TAIL:-12}" "$log"
done
exit $failed
