"""Entry point of ``python -m broadhead``."""

import sys

from broadhead.cli import main

if __name__ == "__main__":
    sys.exit(main())
