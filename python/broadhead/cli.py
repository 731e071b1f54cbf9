"""Entry point of the command `broadhead`; its commands are in cli_commands, which needs typer and rich."""

from __future__ import annotations

import sys
from typing import Any

_PACKAGES = ("typer", "rich")


def build_app() -> Any:
    """The typer application.

    Raises:
        ModuleNotFoundError: typer or rich is missing.
    """
    from broadhead.cli_commands import app

    return app


def main() -> int:
    """Run the command line; without its packages say how to get them."""
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        print(
            f"broadhead: this command needs {error.name}; install it with: pip install 'broadhead[demo]'",
            file=sys.stderr,
        )
        return 2
    app(prog_name="broadhead")
    return 0
