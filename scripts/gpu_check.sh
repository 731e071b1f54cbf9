#!/usr/bin/env bash
# Everything that needs a GPU, from an installed wheel: tests, compute-sanitizer, stress, the demo, benchmarks.
#
# usage: scripts/gpu_check.sh OUT [STAGE...]
#   OUT     a folder for logs and results
#   STAGE   fast full edges clients memcheck racecheck synccheck stress demo gemma4 bench compare; default: all but edges
#           (in full), clients, stress and compare. `clients` runs those that PYTHONPATH has; `bench` takes BENCH_ARGS
#           and BENCH_AREAS; `stress` STRESS_CALLS, the random calls of each of its tests, and STRESS_REPLAYS, the
#           replays of each graph; the sanitizer's stages SANITIZER_SELECT, a `-k` expression over the curated set
#           ("sm90"), and SANITIZER_JOBS, how many run side by side; `compare` COMPARE_BASE, a folder with another
#           installation of broadhead, and COMPARE_ARGS.
# Environment: BROADHEAD_KERNEL_DIR (kernel libraries built before) or BROADHEAD_CUDA_ARCHS, as for pip install.
# The current Python must have torch, pybind11, scikit-build-core, pytest with pytest-xdist; demo its extra.
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
cd "$site" # nothing of the package may come from the source tree
python3 -c "import broadhead, torch; print('broadhead', broadhead.__version__, broadhead.__file__); print('torch', torch.__version__, torch.cuda.get_device_name())"

gpus="$(python3 -c "import torch; print(torch.cuda.device_count())")"
workers=$((gpus * 14 < $(nproc) - 2 ? gpus * 14 : ($(nproc) > 3 ? $(nproc) - 2 : 1)))
export BROADHEAD_TEST_GPUS="$gpus"
export SANITIZER_JOBS="${SANITIZER_JOBS:-6}"

# sanitized LOG WORDS... : the curated set under compute-sanitizer with these options, in shards side by side.
sanitized() {
  local log="$1" jobs=() status=0
  shift
  for ((i = 0; i < SANITIZER_JOBS; i++)); do
    BROADHEAD_TEST_SHARD="$i/$SANITIZER_JOBS" compute-sanitizer "$@" --error-exitcode 9 --target-processes all \
      python3 -m pytest "$root/tests/gpu" -c "$root/pyproject.toml" -m curated -q -p no:cacheprovider --timeout 0 \
      -k "$select" >"$log.$i" 2>&1 &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do
    local code=0
    wait "$job" || code=$?
    [[ $code -eq 0 || $code -eq 5 ]] || status=$code # 5: no test of the shard is selected
  done
  cat "$log".[0-9]* >>"$log"
  rm "$log".[0-9]*
  return "$status"
}

failed=0
for stage in "${stages[@]}"; do
  started=$SECONDS
  log="$out/$stage.log"
  case "$stage" in
    fast) python3 -m pytest "$root/tests/gpu" -c "$root/pyproject.toml" -m "gpu and not full" -n 8 -q -p no:cacheprovider >"$log" 2>&1 ;;
    full) python3 -m pytest "$root/tests/gpu" -c "$root/pyproject.toml" -m gpu -n "$workers" -q -p no:cacheprovider >"$log" 2>&1 ;;
    edges)
      python3 -m pytest "$root/tests/gpu/test_gpu_edges.py" -c "$root/pyproject.toml" -n "$workers" -q -p no:cacheprovider \
        >"$log" 2>&1
      ;;
    clients)
      python3 -m pytest "$root"/tests/{compat,integrations} -c "$root/pyproject.toml" -m gpu -n "$workers" -q \
        -p no:cacheprovider >"$log" 2>&1
      ;;
    memcheck)
      : >"$log"
      # Without torch's caching every tensor is an allocation of its own; graph capture needs the caching.
      select="(${SANITIZER_SELECT:-test}) and not graph"
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitized "$log" --tool memcheck &&
        if [[ -z "${SANITIZER_SELECT:-}" ]]; then select=graph sanitized "$log" --tool memcheck; fi
      ;;
    racecheck | synccheck)
      : >"$log"
      # Our kernels alone: torch's matrix multiplications would take most of the time.
      select="${SANITIZER_SELECT:-test}" sanitized "$log" --tool "$stage" --kernel-name kns=broadhead
      ;;
    stress)
      BROADHEAD_FUZZ_CALLS="${STRESS_CALLS:-500}" BROADHEAD_REPLAYS="${STRESS_REPLAYS:-20000}" \
        python3 -m pytest "$root"/tests/gpu/test_gpu_{fuzz,replays}.py \
        "$root/tests/gpu/test_gpu_backward.py::test_random_calls" -c "$root/pyproject.toml" \
        -n "$workers" -q -p no:cacheprovider --timeout 0 >"$log" 2>&1
      ;;
    demo) python3 -m broadhead demo >"$log" 2>&1 ;;
    gemma4) python3 -m broadhead demo --architecture gemma4 >"$log" 2>&1 ;;
    bench)
      for area in ${BENCH_AREAS:-forward decode host}; do
        # shellcheck disable=SC2086
        python3 "$root/benchmarks/run.py" "$area" --out "$out/results.json" ${BENCH_ARGS:-} || exit 1
      done >"$log" 2>&1
      ;;
    compare)
      # shellcheck disable=SC2086
      python3 "$root/benchmarks/compare_installations.py" \
        --base "${COMPARE_BASE:?a folder with another installation}" --new "$site/lib" \
        --out "$out/compare.json" ${COMPARE_ARGS:-} >"$log" 2>&1
      ;;
    *) echo "gpu_check.sh: unknown stage $stage" >&2; exit 2 ;;
  esac && status=passed || { status="FAILED ($?)"; failed=1; }
  printf '== %s: %s in %d s\n' "$stage" "$status" $((SECONDS - started))
  tail -n "${TAIL:-12}" "$log"
done
exit $failed
