"""Evaluation during training, beside it: each checkpoint of a run is evaluated as it appears, until the run is over.

A process of its own, on a machine of its own if need be: nothing of the training waits for it or is changed by it, and
it works whatever ZeRO stage or number of ranks wrote the checkpoints. Each step's scalars are kept in
``eval/NAME.steps/`` and go to TensorBoard at their steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paralm.errors import CheckpointError, RunError, StoppedError, UserError
from paralm.evaluation.cells import load_steps
from paralm.evaluation.scoring import scoring_version
from paralm.evaluation.suite import Evaluation, Outcome, Progress, read_settings, run_suite
from paralm.evaluation.target import checkpoint_digest
from paralm.export import is_export
from paralm.training import checkpoint as ckpt
from paralm.training.load import saved_config
from paralm.training.session import parse_run

POLL = 10.0  # seconds between looks into the run's folder
PATIENCE = 6 * 3600.0  # seconds without a new checkpoint after which the run is taken for dead


def follow(
    evaluation: type[Evaluation],
    run: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    every: int = 1,
    device: str | None = None,
    data_dir: Path | None = None,
    on_progress: Progress | None = None,
    warn: Callable[[str], None] = lambda message: None,
    poll: float = POLL,
    patience: float = PATIENCE,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Outcome]:
    """Evaluate the checkpoints that are there and those to come, in their order; ends after the run's last step.

    ``every``: only steps that are multiples of it, and the last. Steps measured before, with the same settings, are
    left out. A checkpoint that is removed before its turn, or damaged, is left out with a warning. ``patience``:
    seconds without a new checkpoint after which StoppedError is raised (the same call goes on). Raises UserError, one
    line, for what :func:`run_suite` refuses; RunError for ``RUN@STEP`` or an export, which do not train on.
    """
    path, named = parse_run(run)
    if named is not None or is_export(path):
        raise RunError(f"{run}: only a run can be followed, without a step")
    settings = read_settings(evaluation, overrides)
    config = saved_config(path)
    last, seen, waiting_since = config.training.max_steps, set[int](), time.monotonic()
    while True:
        there = ckpt.steps(path / "checkpoints")
        todo = [step for step in there if step not in seen and (step % every == 0 or step >= last)]
        if not todo:
            if there and there[-1] >= last:
                return
            if time.monotonic() - waiting_since > patience:
                raise StoppedError(
                    f"{path}: no new checkpoint for {patience:.0f} s, the last is of step {there[-1] if there else 0} "
                    f"of {last}; the same command goes on following"
                )
            sleep(poll)
            continue
        step, waiting_since = todo[0], time.monotonic()
        seen.add(step)
        if _measured(evaluation, settings.model_dump(mode="json"), path, step, config.model.vocab_size):
            continue
        try:
            yield run_suite(
                evaluation,
                f"{path}@{step}",
                overrides,
                device=device,
                data_dir=data_dir,
                on_progress=on_progress,
            )
        except (UserError, OSError) as error:
            gone = step not in ckpt.steps(path / "checkpoints")
            if not gone and not isinstance(error, CheckpointError):
                raise
            warn(f"step {step}: {'removed before its turn' if gone else error}; not evaluated")


def _measured(
    evaluation: type[Evaluation], settings: dict[str, Any], run: Path, step: int, vocab_size: int | None
) -> bool:
    """Whether a step has results of these settings and of this very checkpoint, as they are measured now."""
    found = load_steps(run, evaluation.name).get(step)
    if found is None or found.basis.get("settings") != settings or found.basis.get("version") != evaluation.version:
        return False
    try:
        n_tokens = ckpt.open_step(run / "checkpoints", step).manifest["vocab_size"]
        if found.basis.get("scoring", 1) != scoring_version(vocab_size or n_tokens, n_tokens):
            return False
        return found.basis.get("checkpoint") == checkpoint_digest(run, step)[1]
    except CheckpointError:
        return False
