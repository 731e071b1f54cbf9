"""Measures broadhead and its peers: ``python benchmarks/run.py AREA...``."""

import sys

from broadhead_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
