"""Entry point of ``python -m broadhead.bench``."""

import sys

from broadhead.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
