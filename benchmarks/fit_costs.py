"""Fits the costs of kernels to times of ``time_rows.py``, writes them into python/broadhead/costs.py, and says how good
the choice by them is: ``python benchmarks/fit_costs.py FILE... [--judge FILE...]``. It needs numpy.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from broadhead import costs
from broadhead_bench import fit

COSTS = Path(costs.__file__)


def main() -> int:
    parser = argparse.ArgumentParser("python benchmarks/fit_costs.py", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--judge", type=Path, nargs="*", default=[], help="times that nothing is fitted to")
    given = parser.parse_args()
    device, build = fit.described(json.loads(given.files[0].read_text(encoding="utf-8"))["run"])
    timed = fit.read(given.files)
    costs.COSTS.clear()
    print("first row of the table:", fit.judge(timed, device, build))
    costs.COSTS.update(fit.fit(timed, device))
    print("by cost:", fit.judge(timed, device, build))
    if given.judge:
        print("by cost, other seeds:", fit.judge(fit.read(given.judge), device, build))
    fit.write(costs.COSTS, COSTS, ", ".join(path.name for path in given.files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
