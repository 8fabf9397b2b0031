"""``paralm run`` and ``paralm train``: start a run, or continue it."""

from __future__ import annotations

import shlex

import typer

from paralm_launch.commands.arguments import ConfigArgument, OverridesArgument, add_command
from paralm_launch.console import say


def add_to(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    add_command(parent, run)
    add_command(parent, train)


def run(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Prepare the text, train, evaluate, write the report. What is done is skipped; run again to continue.

    Everything goes to the folder RUN.ROOT/RUN.NAME of the configuration. Ctrl-C saves and leaves; the same
    command goes on from there.
    """
    from paralm.config_files import load_config
    from paralm_launch import pipeline

    settings = load_config(config, overrides or []).config
    pipeline.only_rank()
    pipeline.check_start(settings)
    pipeline.prepare_data(settings)
    pipeline.train_run(settings)
    pipeline.evaluate_run(settings.run_dir)
    root, quoted = settings.run_dir, shlex.quote(str(settings.run_dir))
    text = (
        f"  paralm generate {quoted} --prompt 'def '   text from the model\n" if settings.data.synthetic is None else ""
    )
    say(
        f"\nlook next at\n"
        f"  {root / 'report.md'}   the results, with curves{' and samples' if text else ''}\n"
        f"{text}"
        f"  paralm monitor {quoted}   every metric, in a browser"
    )


def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train only, on data that 'paralm data prepare' has made. Run again to continue.

    Under torchrun or srun (RANK and WORLD_SIZE set) this process is one rank of the group.
    """
    from paralm.config_files import load_config
    from paralm_launch import pipeline

    settings = load_config(config, overrides or []).config
    pipeline.check_start(settings)
    pipeline.train_run(settings)
