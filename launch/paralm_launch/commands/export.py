"""``paralm export``: a trained model as files to keep, to publish, or to load with ``paralm.load``; ``paralm import``:
such files out of what transformers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paralm_launch.commands.arguments import RunArgument, add_command
from paralm_launch.console import ProgressLine, quantity, say

if TYPE_CHECKING:
    from paralm.export import ExportResult


def add_to(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    add_command(parent, export)
    add_command(parent, import_model, name="import")


ShardSizeOption = Annotated[str, typer.Option(help="Of one file, such as 5GB or 500MB.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an export that is there.")]


def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; new, or empty.")],
    format: Annotated[str, typer.Option(help="paralm, or transformers: for from_pretrained there.")] = "paralm",
    max_shard_size: ShardSizeOption = "5GB",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default: the run's precision.")] = None,
    force: ForceOption = False,
) -> None:
    """Write a run's model as safetensors with its configuration, tokenizer and the .py files of its imports.

    Any checkpoint will do, whatever number of ranks wrote it, and memory holds no more than a piece of one tensor.
    The folder is taken by 'paralm generate' and by paralm.load(DIR) in Python; with --format transformers by
    from_pretrained, for the architectures that transformers has.
    """
    from paralm.errors import ConfigError
    from paralm.weight_files import parse_size

    if format == "paralm":
        from paralm.export import export as write
    elif format == "transformers":
        from paralm.interop.conversion import export_transformers as write
    else:
        raise ConfigError(f"format {format!r}: give paralm or transformers")
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
    say(f"exported: step {done.step:,}, {_described(done)}")


def import_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that transformers' save_pretrained wrote.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; new, or empty.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A sentencepiece model; default: DIR/tokenizer.model if there.")
    ] = None,
    max_shard_size: ShardSizeOption = "5GB",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default: the weights' own.")] = None,
    force: ForceOption = False,
) -> None:
    """Make a folder like export's out of one that transformers wrote, without transformers.

    The folder is taken by 'paralm generate' and by paralm.load(DIR) in Python.
    """
    from paralm.interop.conversion import import_transformers
    from paralm.weight_files import parse_size

    with ProgressLine() as line:
        done = import_transformers(
            folder,
            to,
            tokenizer=tokenizer,
            max_shard_size=parse_size(max_shard_size),
            dtype=dtype,
            force=force,
            on_progress=lambda at, total: line.update("importing", at, total, f"{at / 1e6:,.0f} MB"),
            warn=lambda message: line.say(f"warning: {message}"),
        )
    say(f"imported: {_described(done)}")


def _described(done: ExportResult) -> str:
    files = f"{len(done.shards)} file{'s' if len(done.shards) > 1 else ''}"
    return f"{quantity(done.parameters)} parameters, {files}, {done.nbytes / 1e6:,.1f} MB → {done.path}"
