"""``paralm eval``, ``generate``, ``compare`` and ``monitor``: what came out of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from paralm.errors import RunError
from paralm_launch.commands.arguments import RunArgument, add_command
from paralm_launch.console import say


def add_to(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    add_command(parent, evaluate, "eval")
    add_command(parent, generate)
    add_command(parent, compare)
    add_command(parent, monitor)


def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] RUN [KEY=VALUE]...",
            help="An evaluation ('paralm eval --list' shows them; without a name: the run's own), a run's folder, "
            "RUN@STEP or an export, and settings.",
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure again what was measured already.")] = False,
    part: Annotated[
        str | None,
        typer.Option(help="Measure a share: 1/4, 'rank' (under torchrun or srun), or 'array' (a SLURM job array)."),
    ] = None,
    ray: Annotated[int, typer.Option(min=0, help="Measure in so many tasks of Ray, on its cluster or here.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", help="Evaluate each checkpoint as it appears, until the run is over.")
    ] = False,
    every: Annotated[
        int, typer.Option(min=1, help="With --follow: only checkpoints of steps that are multiples of this.")
    ] = 1,
    list_: Annotated[bool, typer.Option("--list", help="Show the evaluations, or the settings of NAME.")] = False,
) -> None:
    """Measure a run: its standard evaluation and report, or one evaluation of the suite by name.

    paralm eval RUN scores the held-out text and writes report.md, with curves and samples; KEY=VALUE changes that
    evaluation only, such as eval.max_tokens=1000000.

    paralm eval NAME RUN KEY=VALUE measures one question, such as perplexity or capacity, and adds a page to
    eval/report.md. Interrupted, the same command goes on. An export is measured on the text of data.dir=DIR, which
    the run it came from has in its data folder.
    """
    from paralm_launch import evaluation, pipeline

    given = arguments or []
    if list_:
        if given:
            evaluation.list_settings(given[0])
        else:
            evaluation.list_evaluations()
        return
    if not given:
        raise RunError("nothing to evaluate: paralm eval RUN, or paralm eval NAME RUN ('paralm eval --list')")
    if every > 1 and not follow:
        raise RunError(f"--every {every} goes with --follow: without it one checkpoint is evaluated, as RUN@STEP says")
    chosen = evaluation.find_evaluation(given)
    if chosen is None:
        evaluation.refuse_options_of_the_suite(part=part, follow=follow, ray=ray)
        pipeline.evaluate_run(given[0], given[1:], again)
    elif sum(map(bool, (part, follow, ray))) > 1:
        raise RunError("--part, --ray and --follow go one at a time: take one of them")
    elif follow and again:
        raise RunError("--again does not go with --follow, which leaves out what is measured: give --again to RUN@STEP")
    elif follow:
        evaluation.follow(chosen, given[1], given[2:], every=every)
    elif ray:
        evaluation.evaluate_on_ray(chosen, given[1], given[2:], tasks=ray, again=again)
    else:
        evaluation.evaluate(chosen, given[1], given[2:], again=again, part=part)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Two or more run folders.")],
    out: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("comparison.png"),
) -> None:
    """Overlay the curves of several runs, and print what they reached side by side."""
    from paralm_launch import pipeline

    pipeline.compare_runs(runs, out)


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    max_tokens: Annotated[int, typer.Option(min=0, help="Stop after so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token. 1: as trained.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens whose probability reaches p.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
) -> None:
    """Stream text from a run's newest checkpoint (RUN@STEP: from another) or an export, at constant memory."""
    from paralm.generation import check_options, stream_text
    from paralm.training.load import load_model

    check_options(max_tokens, temperature, top_k, top_p, seed)
    loaded = load_model(run)
    pieces = stream_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
    )
    _write(prompt)
    for piece in pieces:
        _write(piece)
    _write("\n")


def _write(text: str) -> None:
    """At once, with '?' for what the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def monitor(
    path: Annotated[Path, typer.Argument(metavar="RUN|ROOT", help="A run's folder, or a folder of runs to compare.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
) -> None:
    """Show a run's metrics in the browser: TensorBoard, for this machine only. Ctrl-C ends it.

    From elsewhere: ssh -L PORT:127.0.0.1:PORT this-machine, then open the URL there.
    """
    import logging

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard import program

    if not path.is_dir():
        raise RunError(f"{path}: no such folder; give a run (runs/NAME) or a folder of runs (runs)")
    folder = path / "tensorboard" if (path / "tensorboard").is_dir() else path
    if not any(folder.rglob("events.out.tfevents.*")):
        raise RunError(f"{path}: no metrics in it yet; start a run with 'paralm run'")
    board = program.TensorBoard()
    board.configure(
        argv=["paralm monitor", "--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port or _free_port())]
    )
    try:
        url = board.launch()
    except program.TensorBoardServerException as error:
        raise RunError(f"port {port}: {error.msg}; leave --port out for a free one") from None
    say(f"{url}   (Ctrl-C ends it)")
    _wait()


def _free_port() -> int:
    """A port that nobody listens on at this moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait() -> None:
    """Until Ctrl-C or SIGTERM."""
    import signal

    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        say("")
