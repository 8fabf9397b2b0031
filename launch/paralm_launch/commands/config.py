"""``paralm config``: show, check and list configurations. None of it starts anything."""

from __future__ import annotations

import typer

from paralm_launch.commands.arguments import ConfigArgument, OverridesArgument, add_command
from paralm_launch.console import say, table

app = typer.Typer(no_args_is_help=True, help="Show, check and list configurations.")


def add_to(parent: typer.Typer) -> None:
    """Add ``config`` to the application."""
    parent.add_typer(app, name="config")
    add_command(app, show)
    add_command(app, check)
    add_command(app, list_, "list")


def show(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Print the whole configuration, every default filled in, and where each value came from.

    The output is itself a configuration: redirect it to a file to start one of your own. What DeepSpeed is given and
    how the optimizer updates follow as comments.
    """
    import json

    import torch

    from paralm.config_files import annotate, load_config
    from paralm.models import build_model
    from paralm.synthetic import vocab_size_of
    from paralm.training.engine import deepspeed_config
    from paralm.training.optimizers import is_fused

    loaded = load_config(config, overrides or [])
    made, ranks = loaded.config, loaded.config.launcher.ranks or 1
    model = build_model(made.model, vocab_size_of(made.data), seed=0, device="meta")
    generated = deepspeed_config(made, ranks, sum(parameter.numel() for parameter in model.parameters()))
    typer.echo(annotate(loaded), nl=False)
    kinds = ("an operation at a time", "in one kernel")
    offloaded = made.parallel.offload_optimizer != "none"
    here, there = (kinds[is_fused(made.optimizer, gpu, offloaded)] for gpu in (torch.cuda.is_available(), True))
    typer.echo(f"\n# {made.optimizer.name} updates {here} on this machine, {there} on a GPU: optimizer.fused")
    typer.echo(f"\n# DeepSpeed's configuration on {ranks} rank{'s' if ranks > 1 else ''}, generated from the above:")
    typer.echo("\n".join(f"#   {line}" for line in json.dumps(generated, indent=2).splitlines()))


def check(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Check a configuration without starting anything; exit code 2 and one line when it cannot work."""
    from paralm.config_files import load_config
    from paralm_launch.launchers import get_launcher

    loaded = load_config(config, overrides or []).config
    get_launcher(loaded.launcher.kind)
    say(f"ok: {config} describes the run {loaded.run_dir}")


def list_() -> None:
    """List the presets that come with paralm: whole runs, and model sections to include."""
    from paralm import resources

    rows = [(name, resources.describe(path)) for name, path in resources.presets().items()]
    table(None, ("preset", "what it is"), rows)
    say(f"\nfiles: {resources.share_root() / 'configs'}")
