"""What several commands share: their arguments, and how they are added."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or a preset by name ('paralm config list' shows them).")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Values laid over the file, such as training.max_steps=100 run.name=second."
    ),
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart; RUN@STEP for one checkpoint.")
]


def add_command(app: typer.Typer, function: Callable[..., Any], name: str | None = None) -> None:
    """Add a function as a command; its docstring is the help, reflowed to the terminal's width."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    app.command(name=name, help="\n\n".join(" ".join(p.split()) for p in paragraphs))(function)
