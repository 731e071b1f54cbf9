"""Compares two installations: ``python benchmarks/compare_installations.py --base DIR --new DIR --out FILE``."""

import sys

from broadhead_bench.compare import main

if __name__ == "__main__":
    sys.exit(main())
