"""``paralm export``: a trained model as files to keep, to publish, or to load with ``paralm.load``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paralm_launch.commands.arguments import RunArgument, add_command
from paralm_launch.console import ProgressLine, quantity, say


def add_to(parent: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(parent, export)


def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; new, or empty.")],
    max_shard_size: Annotated[str, typer.Option(help="Of one file, such as 5GB or 500MB.")] = "5GB",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default: the run's precision.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
) -> None:
    """Write a run's model as safetensors with its configuration and tokenizer.

    Any checkpoint will do, whatever number of ranks wrote it, and memory holds no more than a piece of one tensor.
    The folder is taken by 'paralm generate' and by paralm.load(DIR) in Python.
    """
    from paralm.export import export as write
    from paralm.weight_files import parse_size

    with ProgressLine() as line:
        done = write(
            run,
            to,
            max_shard_size=parse_size(max_shard_size),
            dtype=dtype,
            force=force,
            on_progress=lambda at, total: line.update("exporting", at, total, f"{at / 1e6:,.0f} MB"),
            warn=lambda message: line.say(f"warning: {message}"),
        )
    files = f"{len(done.shards)} file{'s' if len(done.shards) > 1 else ''}"
    say(
        f"exported: step {done.step:,}, {quantity(done.parameters)} parameters, {files}, {done.nbytes / 1e6:,.1f} MB "
        f"→ {done.path}"
    )
