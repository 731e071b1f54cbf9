"""Answers as tables in colour, for terminals. rich leaves the colours out where NO_COLOR is set or TERM is dumb."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from broadhead.api.explanation import Explanation

#: Colours of the answer.
_STYLES = {"cuda": "bold green", "torch": "bold yellow", "refused": "bold red"}


def on_terminal() -> bool:
    """Whether the output goes to a terminal; what reads a pipe gets plain lines."""
    return Console().is_terminal


def print_explanation(found: Explanation, console: Console | None = None) -> None:
    """The answer, what to do, the facts, then a table of reasons for each thing that stands in the way."""
    console = Console() if console is None else console
    # Neither markup nor highlighting: the texts hold brackets and numbers of their own.
    console.print(Text("runs on: ", "bold").append(found.answer, _STYLES[found.backend]))
    facts = Table.grid(padding=(0, 2))
    if found.remedy:
        facts.add_row(Text("what to do", "bold"), Text(found.remedy))
    for name, text in found.facts:
        facts.add_row(Text(name, "cyan"), Text(text))
    console.print(Padding(facts, (0, 0, 0, 2)))
    for heading, reasons in found.grouped().items():
        table = Table("kernels", "reason", title=heading, title_justify="left", title_style="bold", box=SIMPLE)
        for reason in reasons:
            row: list[RenderableType] = [Text(reason.who()), Text(reason.text)]
            table.add_row(*row)
        console.print(table)
