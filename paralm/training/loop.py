"""Training, top-down: open the session, then batch → step → record → validate → save, until done or stopped.

The same call continues a run that exists. What a step computes is a function of the run's configuration, the
step number and the restored state alone, so a run that was killed and started again repeats, to the last bit,
what it would have done.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from paralm_data import MixtureLoader, Task

from paralm.config import Config
from paralm.errors import DivergedError, RunError, StoppedError
from paralm.evaluation.answers import validate_answers
from paralm.evaluation.perplexity import validate
from paralm.models import flops_per_token
from paralm.training.checkpoint import has_steps
from paralm.training.control import Control
from paralm.training.lockstep import Lockstep
from paralm.training.metrics import memory_bytes, peak_flops
from paralm.training.rendezvous import rank_and_world
from paralm.training.schedule import learning_rate
from paralm.training.session import Session
from paralm.training.step import StepResult
from paralm.training.watch import note, watching

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended."""

    run_dir: Path
    step: int
    tokens: int
    loss: float | None  # of the last step; None when there was nothing left to do
    parameters: int
    seconds: float  # of this call
    bad_steps: int
    first_step: int = 0  # that this call went on from: of a run that continues, or a fork


def train(config: Config, on_progress: Progress | None = None, say: Callable[[str], None] = print) -> TrainResult:
    """Train (or continue) the run that ``config`` describes, in this process, as one rank of the group.

    ``on_progress`` receives every metrics row (rank 0). Raises StoppedError after a signal or
    ``training.stop_after_seconds`` (all is saved), DivergedError after too many bad steps, UserError for what
    cannot work.
    """
    with watching(config.run_dir, *rank_and_world(), config.parallel.collective_timeout):
        session = Session.open(config, say)
        try:
            folder, limit = session.folder, config.training.hang_timeout
            control = Control(folder.stacks, folder.ranks, session.rank, limit, session.world_size)
            with control, Profiler(session) as profiler:
                return _run(session, control, profiler, on_progress or (lambda row: None))
        finally:
            session.close()


def _run(session: Session, control: Control, profiler: Profiler, on_progress: Progress) -> TrainResult:
    training = session.config.training
    recorder = Recorder(session, on_progress)
    loss, first_step = None, session.step
    if session.owes_validation:  # the attempt before was asked to stop and saved first
        note("validation", session.step)
        recorder.validation()
        session.owes_validation = False
    while session.step < training.max_steps:
        control.alive()
        note("step", session.step + 1)
        profiler.before(session.step)
        start = time.perf_counter()
        batch = session.loader.batch(session.step)
        fetched = time.perf_counter() - start
        last = session.step + 1 == training.max_steps
        if not last:
            session.ahead.read(session.loader, session.step + 1)
        lr = learning_rate(session.config, session.step)
        logged = last or (session.step + 1) % training.log_every == 0
        with session.over_time():
            result = session.stepper.run(batch, session.step, lr, lambda: _stop_request(session, control), timed=logged)
        session.step += 1
        session.tokens += recorder.tokens_per_step
        session.loader.step = session.step
        if session.learner is not None:
            session.learner.after(session.step)
        loss = result.loss
        _count_bad(session, result)
        if logged or result.bad or result.spike:
            recorder.step(result, lr, fetched, time.perf_counter() - start)
        _leave_if_diverged(session, result)
        validates = last or bool(training.validate_every and session.step % training.validate_every == 0)
        if result.stop_signal and not last:  # save first: whoever sent the signal may not wait for more
            note("save", session.step)
            session.owes_validation = validates
            written = session.save()
            _leave_if_superseded(session)
            raise StoppedError(_stop_message(session, result.stop_signal, written))
        if validates:
            note("validation", session.step)
            recorder.validation()
        if last or session.step % session.config.checkpoint.every == 0:
            note("save", session.step)
            written = session.save(wait=last)
            _leave_if_superseded(session)
            if last and not written:
                raise RunError(
                    f"{session.folder.path}: the last checkpoint could not be written; see the warning above"
                )
    return TrainResult(
        session.folder.path,
        session.step,
        session.tokens,
        loss,
        session.parameters,
        time.monotonic() - session.started,
        session.bad_steps,
        first_step,
    )


def _stop_request(session: Session, control: Control) -> int:
    """A signal's number, −1 for a spent time allowance, 0 for neither; the ranks agree on the largest."""
    if session.saver.must_stop:
        return int(signal.SIGABRT)  # the save that follows says why, on every rank
    limit = session.config.training.stop_after_seconds
    if control.stop_signal is None and limit is not None and time.monotonic() - session.started > limit:
        return int(signal.SIGALRM)
    return int(control.stop_signal or 0)


def _stop_message(session: Session, number: int, written: bool) -> str:
    why = "training.stop_after_seconds" if number == signal.SIGALRM else signal.Signals(number).name
    saved = "saved; the same command continues" if written else "the checkpoint could not be written"
    return f"stopped by {why} at step {session.step}; {saved}"


def _count_bad(session: Session, result: StepResult) -> None:
    """Count skipped updates."""
    session.spikes += result.spike
    session.bad_steps += result.bad
    session.bad_in_row = session.bad_in_row + 1 if result.bad else 0


def _leave_if_diverged(session: Session, result: StepResult) -> None:
    """After several bad steps in a row leave, with the last good checkpoint in place."""
    if session.bad_in_row < session.config.training.max_bad_steps:
        return
    where = "there is no checkpoint yet. Lower optimizer.lr"
    if has_steps(session.folder.checkpoints):  # from then on the rate is the run's
        where = (
            "the last checkpoint stands. Lower optimizer.lr in a run of another name, with training.fork_from="
            f"{session.folder.path}"
        )
    raise DivergedError(
        f"{session.bad_in_row} steps in a row had a non-finite loss or gradient (loss {result.loss} at "
        f"step {session.step}); {where}, or raise training.max_bad_steps"
    )


def _leave_if_superseded(session: Session) -> None:
    if session.superseded():
        raise RunError(f"{session.folder.path}: a later attempt has begun; attempt {session.attempt} leaves it the run")


class Recorder:
    """Rows of metrics: to the run folder and to whoever watches."""

    def __init__(self, session: Session, on_progress: Progress) -> None:
        self.session, self.on_progress = session, on_progress
        config = session.config.training
        self.tokens_per_step = config.global_batch_size * config.seq_len
        self.flops_per_step = flops_per_token(session.blueprint, config.seq_len) * self.tokens_per_step
        peak = peak_flops(session.device, config.precision)
        self.peak = peak * session.world_size if peak else None
        self.first = session.step
        self.began = time.monotonic()

    def _write(self, row: dict[str, Any]) -> None:
        self.session.write(row)
        if self.session.rank == 0:
            self.on_progress(row)

    def step(self, result: StepResult, lr: float, fetched: float, seconds: float) -> None:
        session = self.session
        mixed = session.loader
        learned = session.learner.seconds if session.learner is not None else None
        left = session.config.training.max_steps - session.step
        pace = (time.monotonic() - self.began) / (session.step - self.first)
        self._write(
            {
                "kind": "train",
                "step": session.step,
                "tokens": session.tokens,
                "loss": result.loss,
                "aux_loss": result.aux,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "tokens_per_s": self.tokens_per_step / seconds,
                "time_total": seconds,
                "time_data": fetched,
                "time_forward_backward": result.seconds["forward_backward"],
                "time_step": result.seconds["step"],
                "elapsed": time.monotonic() - session.started,
                "eta": left * pace,
                "memory_bytes": memory_bytes(session.device),
                "bad_steps": session.bad_steps,
                "skipped": result.bad or result.spike,
                "spikes": session.spikes,
                "mfu": self.flops_per_step / seconds / self.peak if self.peak else None,
                "newton": result.newton,
                "max_steps": session.config.training.max_steps,
                **({"time_alignment": learned} if learned is not None else {}),
                **({"mixture": mixed.report(session.step)} if isinstance(mixed, MixtureLoader) else {}),
            }
        )

    def validation(self) -> None:
        """Every validation set's loss and bits per byte, over the same documents at any world size; of a task's
        held-out split, the loss and the share of right answers."""
        session, config = self.session, self.session.config
        session.engine.eval()
        shared: dict[str, Any] = {
            "rows": config.eval.rows,
            "chunk": config.eval.chunk,
            "device": session.device,
            "rank": session.rank,
            "world_size": session.world_size,
        }
        if session.task is not None:
            self._task_validation(session.task, shared)
        # A state that grows is scored in windows, as it was trained; a bounded one over whole documents.
        reset_every = config.eval.reset_every or (None if session.model.bounded_state else config.training.seq_len)
        for name, store in session.validation.items():
            score = partial(validate, store=store, max_tokens=config.training.validate_tokens, reset_every=reset_every)
            loss_sum, tokens, n_bytes, _ = self._over_ranks(partial(score, **shared))
            self._write(
                {
                    "kind": "validation",
                    "step": session.step,
                    "set": name,
                    "loss": loss_sum / max(1.0, tokens),
                    "tokens": int(tokens),
                    "bits_per_byte": loss_sum / max(1.0, n_bytes) / 0.6931471805599453,
                }
            )
        session.engine.train()

    def _task_validation(self, task: Task, shared: dict[str, Any]) -> None:
        session, config = self.session, self.session.config
        count = max(1, config.training.validate_tokens // config.training.seq_len)
        known: dict[str, Any] = {"vocab_size": session.blueprint.vocab_size, "seed": config.run.seed}
        score = partial(validate_answers, task=task, count=count, **known, **shared)
        loss, answers, right, examples, whole = self._over_ranks(score)
        self._write(
            {
                "kind": "validation",
                "step": session.step,
                "set": "held_out",
                "loss": loss / max(1.0, answers),
                "tokens": int(answers),
                "accuracy": right / max(1.0, answers),
                "sequence_accuracy": whole / max(1.0, examples),
            }
        )

    def _over_ranks(self, score: Callable[[Any], Any]) -> list[float]:
        """The fields, in order, of what ``score(model)`` finds (a dataclass of numbers), each summed over the ranks."""
        session = self.session
        if session.config.parallel.zero_stage == 3:
            lockstep = Lockstep(session.engine, session.device)
            sums = score(lockstep)
            lockstep.finish()
        else:
            sums = score(session.engine)
        total = torch.tensor(astuple(sums), dtype=torch.float64, device=session.device)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found


class Profiler:
    """A torch.profiler trace of ``training.profile_steps`` (first, last), for TensorBoard or chrome://tracing."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.steps = session.config.training.profile_steps
        self.profile: torch.profiler.profile | None = None

    def __enter__(self) -> Profiler:
        return self

    def before(self, step: int) -> None:
        """Called before finished step number ``step`` + 1 is taken."""
        if self.steps is None:
            return
        first, last = self.steps
        if self.profile is None and first <= step + 1 <= last:
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()
        elif self.profile is not None and step + 1 > last:
            self._export()

    def _export(self) -> None:
        if self.profile is None or self.steps is None:
            return
        profile, (first, last) = self.profile, self.steps
        self.profile, self.steps = None, None
        profile.stop()
        folder = self.session.folder.profile
        path = folder / f"rank_{self.session.rank:05d}_steps_{first}_{last}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of an attempt before
            profile.export_chrome_trace(str(path))
            whole = _ends_whole(path)
            if not whole:  # torch has told nobody, and may have written beside it only
                for remains in folder.glob(f"{path.name}*"):
                    remains.unlink()
        except OSError as error:  # training can do without
            self.session.warn(f"{path}: the profile could not be written: {error.strerror or error}")
            return
        if whole:
            self.session.say(f"profile written to {path}")
        else:
            self.session.warn(f"{path}: the profile could not be written whole; is the disk full?")

    def __exit__(self, *error: object) -> None:
        self._export()


def _ends_whole(trace: Path) -> bool:
    """Whether a trace has the name and the brace that torch writes last. Raises OSError."""
    if not trace.exists():
        return False
    with trace.open("rb") as file:
        file.seek(max(0, trace.stat().st_size - 8192))  # the name is the trace's path
        end = file.read().rstrip()
    return b'"traceName"' in end and end.endswith(b"}")
