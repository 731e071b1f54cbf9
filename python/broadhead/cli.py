"""Entry point of the command `broadhead`; its commands are in cli_commands, which needs typer and rich."""

from __future__ import annotations

import sys
from typing import Any

_PACKAGES = ("typer", "rich")

#: Exit status of a command whose check failed.
FAILED = 1


def build_app() -> Any:
    """The typer application.

    Raises:
        ModuleNotFoundError: typer or rich is missing.
    """
    from broadhead.cli_commands import app

    return app


def main() -> int:
    """Run the command line. Whatever fails is followed by what is missing here.

    Without typer and rich there is `broadhead info` alone, which whoever has a problem can run; the others say how to
    get the packages.
    """
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        return _without_packages(error.name, sys.argv[1:])
    try:
        app(prog_name="broadhead")
    except SystemExit as end:
        if end.code == FAILED:
            _show_what_is_missing()
        raise
    except Exception:
        _show_what_is_missing()
        raise
    return 0


def _without_packages(missing: str, arguments: list[str]) -> int:
    if arguments and arguments[0] == "info":
        from broadhead.info import report

        print(report("--json" in arguments))
        return 0
    print(
        f"broadhead: this command needs {missing}; install it with: pip install {' '.join(_PACKAGES)}"
        " (`broadhead info` needs neither)",
        file=sys.stderr,
    )
    return 2


def _show_what_is_missing() -> None:
    from broadhead.info import look

    print(f"\n{look().summary()}\n`broadhead info` shows more", file=sys.stderr)
