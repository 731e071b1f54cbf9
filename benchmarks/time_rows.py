"""Times every row of the table on short cases of the landscape:
``python benchmarks/time_rows.py --seeds 1 2 3 --cases 200 --out FILE``; ``fit_costs.py`` reads the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from broadhead_bench.row_times import run


def main() -> int:
    parser = argparse.ArgumentParser("python benchmarks/time_rows.py", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--cases", type=int, default=200, help="cases of each seed, of which long ones are left out")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds to spend; cases of all seeds take turns")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    return 1 if run(given.seeds, given.cases, given.budget, given.out, sys.argv[1:]) else 0


if __name__ == "__main__":
    sys.exit(main())
