"""``paralm plan``: what a model is made of, before anything is allocated."""

from __future__ import annotations

import typer

from paralm_launch.commands.arguments import ConfigArgument, OverridesArgument, add_command
from paralm_launch.console import say, table


def add_to(parent: typer.Typer) -> None:
    """Add ``plan`` to the application."""
    add_command(parent, plan)


def plan(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Count a model's parameters by part, its state and its FLOPs. CONFIG: a run's, or a model preset (mamba2_7b).

    Nothing is allocated: 7B answers in seconds on a laptop. Without model.vocab_size the vocabulary is that of
    data.tokenizer, or of the task of data.synthetic.
    """
    from paralm import resources
    from paralm.config_files import load_config
    from paralm.planning import plan_model
    from paralm.synthetic import vocab_size_of

    if resources.find_preset(config) is None and resources.find_preset(f"model/{config}") is not None:
        config = f"model/{config}"
    made = load_config(config, overrides or []).config
    found = plan_model(made.model, vocab_size_of(made.data), made.training.seq_len)
    rows = [
        (part.name, f"{part.layers}" if part.layers else "", f"{part.parameters:,}", f"{share:.1%}")
        for part in found.parts
        for share in (part.parameters / found.parameters,)
    ]
    table(None, ("part", "layers", "parameters", "share"), [*rows, ("all", "", f"{found.parameters:,}", "")])
    if found.state_elements is None or found.state_bytes is None:
        say("\nstate: grows with the tokens read")
    else:
        say(f"\nstate of a sequence: {found.state_elements:,} numbers, {found.state_bytes / 2**20:,.1f} MiB in bf16")
    say(f"FLOPs a token, forward and backward at seq_len {found.seq_len:,}: {found.flops_per_token:.3g}")
