"""``paralm data``: prepare a corpus, look into what was prepared, and see what a training step saw."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paralm.errors import RunError
from paralm_launch.commands.arguments import ConfigArgument, OverridesArgument, RunArgument, add_command
from paralm_launch.console import quantity, say, table

if TYPE_CHECKING:
    from paralm_data import Batch, MixtureLoader, StoreReport, Task, Tokenizer

app = typer.Typer(no_args_is_help=True, help="Prepare text, inspect it, and see what a training step saw.")


def add_to(parent: typer.Typer) -> None:
    """Add ``data`` to the application."""
    parent.add_typer(app, name="data")
    add_command(app, prepare)
    add_command(app, inspect)
    add_command(app, show)


def prepare(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Make the tokenizer and the token stores of a configuration, as far as they are not there.

    They go to data.dir, or to the run's folder when that is not set. 'paralm run' does this by itself.
    data.executor=local|shared|ray|mpi and data.workers=N say who does it. With shared, the same command on any number
    of machines that see the folder shares the work; with mpi, every rank under mpirun or srun works. The same command
    goes on after an interruption.
    """
    from paralm.config_files import load_config
    from paralm_launch import pipeline, preparing
    from paralm_launch.discovery import settle

    settings = load_config(config, overrides or []).config
    if settings.data.executor == "mpi" and preparing.is_mpi_rank():
        settle()  # every rank is wanted
    elif settings.data.executor != "shared":
        pipeline.only_rank()
    pipeline.prepare_data(settings)


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run's folder, a prepared folder, or one token store in it.")
    ],
    samples: Annotated[int, typer.Option(min=0, help="How many documents to decode from each store.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens of each to show.")] = 120,
    full: Annotated[bool, typer.Option("--full", help="Check every byte against the manifest's checksums.")] = False,
) -> None:
    """Print statistics of token stores, and some documents decoded."""
    import paralm_data

    from paralm_launch import pipeline

    if (path / "config.yaml").is_file():
        place = pipeline.open_run(path)
        if place.config.data.synthetic is not None:
            raise RunError(
                f"{path}: of a synthetic task, which is not stored; see a step of it: paralm data show {path}"
            )
        path = place.data_dir
    for report in paralm_data.inspect(path, samples=samples, sample_tokens=tokens, verify="full" if full else "size"):
        _print_report(report)


def show(
    run: RunArgument,
    step: Annotated[int, typer.Option(min=1, help="The step, as metrics.jsonl counts them; the first is 1.")],
    rank: Annotated[int, typer.Option(min=0, help="The rank whose rows to show.")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="The number of ranks; with 1, the whole global batch.")] = 1,
) -> None:
    """Print the exact text that a training step of a run saw; of a later step, what the run would see if it went on."""
    from paralm_data import MixtureLoader, SyntheticLoader, Tokenizer

    from paralm.data_sets import open_loader
    from paralm.synthetic import task_of
    from paralm_launch import pipeline

    place = pipeline.open_run(run)
    training, data = place.config.training, place.config.data
    if step > training.max_steps:
        say(f"the run ends at step {training.max_steps:,} (training.max_steps); no step {step:,} of it saw this:")
    task = task_of(data)
    if task is not None:
        rows = (training.seq_len, training.global_batch_size, place.config.run.seed)
        batch = SyntheticLoader(task, *rows, rank=rank, world_size=world_size).batch(step - 1)
        _print_examples(batch, task, step, rank, world_size)
        return
    loader = open_loader(place.config, place.data_dir, rank, world_size)
    tokenizer = Tokenizer.load(place.data_dir / "tokenizer.model")
    for store in [source.store for source in loader.sources] if isinstance(loader, MixtureLoader) else [loader.store]:
        store.check_tokenizer(tokenizer)
    if isinstance(loader, MixtureLoader) and loader.bandit is not None:
        _go_to(loader, place.path, step)
    names = [source.name for source in loader.sources] if isinstance(loader, MixtureLoader) else None
    _print_batch(loader.batch(step - 1), tokenizer, step, rank, world_size, names)


def _go_to(loader: MixtureLoader, run: Path, step: int) -> None:
    """Give a learned mixture the weights of ``step``, from a checkpoint in its round. RunError if there is none."""
    from paralm.training import checkpoint

    checkpoints = run / "checkpoints"
    there = checkpoint.steps(checkpoints)
    before, after = [found for found in there if found < step], [found for found in there if found >= step]
    if before:
        loader.load_state_dict(checkpoint.open_step(checkpoints, before[-1]).manifest["loader"])
    known = loader.known_until
    if after and not loader.knows(step - 1):  # a later one, if it is of the same round
        loader.load_state_dict(checkpoint.open_step(checkpoints, after[0]).manifest["loader"])
    if not loader.knows(step - 1):
        last = before[-1] if before else 0
        raise RunError(
            f"{run}: what step {step} drew follows from weights that were learned on the way; the checkpoints there "
            f"are tell those of steps {last + 1} to {known}"
        )


def _print_report(report: StoreReport) -> None:
    source = ", ".join(f"{key} {value}" for key, value in _leaves(report.source) if value not in (None, "", []))
    lengths = ", ".join(f"{q:.0%} {n:,}" for q, n in report.length_quantiles.items())
    rows = [
        ("documents", f"{report.n_documents:,}"),
        ("tokens", f"{report.n_tokens:,} ({report.dtype})"),
        ("text", f"{report.n_bytes:,} bytes, {report.bytes_per_token:.2f} a token"),
        ("vocabulary", f"{report.vocab_size:,}, of which used {report.used_ids:,}"),
        ("tokens a document", lengths),
        ("most frequent", " ".join(f"{t.piece!r}×{quantity(t.count)}" for t in report.most_frequent[:12])),
        ("tokenizer SHA-256", report.tokenizer_sha256),
        ("checked", "sizes only (--full checks every byte)" if report.verified == "size" else "every byte"),
        *([("made from", source)] if source else []),
    ]
    table(str(report.path), ("", ""), rows)
    for sample in report.samples:
        more = "…" if sample.truncated else ""
        say(f"\n── document {sample.document}: {sample.n_tokens:,} tokens, {sample.n_bytes:,} bytes")
        say(f"{sample.text}{more}")
    say("")


def _leaves(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield key, value


def _print_examples(batch: Batch, task: Task, step: int, rank: int, world_size: int) -> None:
    say(f"step {step}, rank {rank} of {world_size}: {len(batch.rows)} examples of task '{task.name}'")
    for row, tokens, labels in zip(batch.rows, batch.tokens.tolist(), batch.labels.tolist()):
        length = max((i + 1 for i, (t, y) in enumerate(zip(tokens, labels)) if t != task.pad_id or y >= 0), default=0)
        say(f"\n── example {row}: {length} tokens, {sum(y >= 0 for y in labels)} answers")
        if task.tokenizer is not None:
            say(task.tokenizer.decode(tokens[:length]))
            continue
        width = len(str(task.vocab_size))
        say("tokens  " + " ".join(f"{t:>{width}}" for t in tokens[:length]))
        say("answers " + " ".join(f"{y if y >= 0 else '·':>{width}}" for y in labels[:length]))


def _print_batch(
    batch: Batch, tokenizer: Tokenizer, step: int, rank: int, world_size: int, names: Sequence[str] | None = None
) -> None:
    say(f"step {step}, rank {rank} of {world_size}: {len(batch.rows)} rows, epoch {batch.epoch:.4f}")
    of = [""] * len(batch.rows)
    if names is not None and batch.sources is not None:
        of = [f" of {names[source]}" for source in batch.sources.tolist()]
    for row, source, tokens, labels, reset in zip(batch.rows, of, batch.tokens, batch.labels, batch.reset):
        starts = reset.nonzero().flatten().tolist()
        masked = int((labels < 0).sum())
        begins = f", documents begin at {', '.join(map(str, starts))}" if starts else ""
        say(f"\n── row {row}{source}: {len(tokens)} tokens, {masked} without a label{begins}")
        edges = sorted({0, *starts, len(tokens)})
        for first, last in itertools.pairwise(edges):
            if first in starts:
                say("   ▸ a document begins")
            say(tokenizer.decode(tokens[first:last].tolist()))
