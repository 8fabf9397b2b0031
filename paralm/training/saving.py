"""Saving: what of a session goes into a checkpoint, and how the ranks write it together."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paralm.errors import RunError
from paralm.training import checkpoint as ckpt
from paralm.training import rng
from paralm.training.checkpoint_writer import CheckpointWrite, HostBuffer, Plan
from paralm.training.fragments import MASTER
from paralm.training.together import broadcast, gather

if TYPE_CHECKING:
    from paralm.training.session import Session

_SLOW = 1.0  # seconds that a save may wait for the one before it without a word


def own_tensors(session: Session) -> dict[str, torch.Tensor]:
    """What belongs to this rank alone: its generators and its carried states."""
    own = {f"rng/{key}": value for key, value in rng.capture().items()}
    carried = session.stepper.carried_rows(len(session.rows(session.rank, session.world_size)))
    for index, leaf in enumerate(carried or []):
        own[f"carried/{index:05d}"] = leaf
    return own


def manifest(session: Session) -> dict[str, Any]:
    """What the manifest says of the run at this step, besides files and fragments."""
    fragments = session.fragments
    keys = sorted({key for flat in fragments.flats for key in fragments.tensor_state(flat)})
    return {
        "step": session.step,
        "tokens": session.tokens,
        "world_size": session.world_size,
        "zero_stage": session.config.parallel.zero_stage,
        "threads": torch.get_num_threads(),
        "bad_steps": session.bad_steps,
        "bad_in_row": session.bad_in_row,
        "spikes": session.spikes,
        "owes_validation": session.owes_validation,
        "losses": session.stepper.spikes.state(),
        "carried": session.stepper.carry,
        "state_noise": session.stepper.noise.state() if session.stepper.noise is not None else None,
        "optimizer": {
            "name": session.config.optimizer.name,
            "tensor_keys": keys,
            "scalars": fragments.scalar_state(),
        },
        "parameters": {name: {"shape": list(shape)} for name, shape in session.shapes.items()},
        "loader": session.loader.state_dict(),
        "tokenizer_sha256": session.tokenizer_sha256,
        "vocab_size": session.vocab_size,
        "modules": session.modules,
        "draws": session.draws,
    }


class FragmentTensors:
    """(kind, parameter, offset, 1-D tensor) of what this rank owns of the masters and the optimizer's state.

    Can be iterated again and again; a tensor is asked for when its turn comes, because one that is offloaded may
    only be on loan until the next.
    """

    def __init__(self, session: Session) -> None:
        self._fragments = session.fragments

    def __iter__(self) -> Iterator[tuple[str, str, int, torch.Tensor]]:
        for fragment in self._fragments:
            yield MASTER, fragment.name, fragment.offset, fragment.view(fragment.flat)
            for key, tensor in self._fragments.tensor_state(fragment.flat).items():
                yield key, fragment.name, fragment.offset, fragment.view(tensor)


class Saver:
    """Writes the checkpoints of a session: in the loop's time, or beside it (``checkpoint.asynchronous``).

    Both ways are one: a :class:`CheckpointWrite` is begun, and :meth:`_settle` waits for it and makes the ranks
    agree on what came of it – at once, or when the next checkpoint is due. There is never more than one on its way:
    a save that comes too early waits, because a step skipped is a step that retention, forks and evaluation miss.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.count = 0
        self.write: CheckpointWrite | None = None
        self._said = False
        self.buffer: HostBuffer | None = None
        self.passed_over: set[int] = set()  # on rank 0: steps of checkpoints beyond the one that is gone on from
        self.refused: dict[int, str] = {}  # steps of old checkpoints that the storage does not remove, and why
        self._told: set[int] = set()  # of these

    def prepare(self) -> None:
        """Look at what is there, and allocate the buffer of asynchronous saves, when the session is set up."""
        session = self.session
        if session.rank == 0:
            self.passed_over = {step for step in ckpt.steps(session.folder.checkpoints) if step > session.step}
        if session.config.checkpoint.asynchronous:
            self.buffer = HostBuffer(pin=session.device.type == "cuda")
            sizes = []
            for fragment in session.fragments:
                # An optimizer that has not taken a step yet has no state: AdamW's is assumed, the largest there is.
                states = len(session.fragments.tensor_state(fragment.flat)) or 2
                sizes += [fragment.numel * fragment.flat.dtype.itemsize] * (1 + states)
            sizes += [tensor.numel() * tensor.dtype.itemsize for tensor in own_tensors(session).values()]
            self.buffer.reserve(sizes)

    def save(self, wait: bool = True) -> bool:
        """Write a checkpoint of the session's finished steps; a collective.

        ``wait``: until it is whole, on all ranks; asynchronous saves that need not be are only begun. Returns
        whether it was written, or begun. When the storage refuses, the previous checkpoints stay and training goes
        on; the reason is said, here or by :meth:`report`. Raises RunError, on all ranks, when
        ``checkpoint.on_failure`` is ``stop``: for this checkpoint, or for the last one if that was only begun.
        """
        session = self.session
        self._settle()
        if session.superseded():
            return False
        wait = wait or self.buffer is None
        fragments: Any = FragmentTensors(session)
        own = own_tensors(session)
        if not wait and self.buffer is not None:
            self.buffer.clear()
            fragments = [(*where, self.buffer.copy(tensor)) for *where, tensor in fragments]
            own = {key: self.buffer.copy(tensor) for key, tensor in own.items()}
            if session.device.type == "cuda":
                torch.cuda.synchronize(session.device)
        self.count += 1
        self._said = False
        self.write = CheckpointWrite(self._plan(), fragments, own)
        return self._settle() if wait else True

    def _plan(self) -> Plan:
        session = self.session
        folder, step, attempt = session.folder, session.step, session.attempt
        return Plan(
            checkpoints=folder.checkpoints,
            step=step,
            attempt=attempt,
            count=self.count,
            rank=session.rank,
            world_size=session.world_size,
            patience=session.config.training.hang_timeout,
            superseded=lambda: folder.superseded(attempt),
            meta=manifest(session) if session.rank == 0 else {},
            before_manifest=lambda: _sync(folder.metrics),
            retention=lambda: self._retain(step),
        )

    def _retain(self, step: int) -> None:
        """What is kept, now that ``step`` is written; in the writing thread."""
        self.passed_over.discard(step)
        keep = self.session.config.checkpoint
        folder = self.session.folder.checkpoints
        ckpt.apply_retention(folder, keep.keep_last, keep.keep_every, step, self.passed_over, self.refused.setdefault)

    def _settle(self) -> bool:
        """Wait for the write on its way, if there is one, and agree on its outcome; a collective."""
        write, session = self.write, self.session
        if write is None:
            return True
        began = time.monotonic()
        write.written.wait()
        # A rank that could not write may not have been able to write a record of it either.
        problems = [problem for problem in gather(write.problem) if problem]
        if problems:
            write.give_up(problems[0])
        write.finished.wait()
        waited = time.monotonic() - began
        problem, superseded = broadcast((write.problem, write.superseded))
        write.problem = problem
        step = write.plan.step
        if step != session.step and waited > _SLOW:
            self._warn(
                f"step {session.step} waited {waited:.1f} s for the checkpoint of step {step}, which took "
                f"{write.seconds:.1f} s to write; raise checkpoint.every, or use faster storage"
            )
        self._say_failure()
        self.write = None
        if problem and not superseded and session.config.checkpoint.on_failure == "stop":
            raise RunError(
                f"checkpoint of step {step} not written, the previous one stays: {problem}; training stops because "
                "checkpoint.on_failure is 'stop'"
            )
        return problem is None

    @property
    def must_stop(self) -> bool:
        """On rank 0: whether a checkpoint has failed meanwhile and the next :meth:`save` is going to say so."""
        write = self.write
        if write is None or not write.finished.is_set() or self.session.config.checkpoint.on_failure != "stop":
            return False
        return write.problem is not None and not write.superseded

    def report(self) -> None:
        """Say what has become of a checkpoint that was written meanwhile, if it failed; no collective."""
        if self.write is not None and self.write.finished.is_set():
            self._say_failure()

    def _say_failure(self) -> None:
        for step in self.refused.keys() - self._told:
            self._told.add(step)
            self._warn(f"checkpoint of step {step} is old and cannot be removed, it stays: {self.refused[step]}")
        write = self.write
        if write is None or (write.problem or write.remark) is None or write.superseded or self._said:
            return
        self._said = True
        what = f"checkpoint of step {write.plan.step}"
        if write.problem is None:
            self._warn(f"{what} written, but '{ckpt.LATEST}' does not name it: {write.remark}")
        else:
            self._warn(f"{what} not written, the previous one stays: {write.problem}")

    def _warn(self, message: str) -> None:
        if self.session.rank == 0:
            self.session.warn(message)

    def close(self) -> None:
        """Finish what is being written, without the other ranks, which may be gone; no collective."""
        if self.write is None:
            return
        self.write.hurry()
        if self.write.join(self.session.config.training.hang_timeout):
            self._say_failure()
        else:
            self._warn(f"checkpoint of step {self.write.plan.step} is left unfinished: the storage does not answer")
        self.write = None


def _sync(path: Path) -> None:
    """Put a file's content on the disk, through a descriptor of its own: its writer goes on meanwhile."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())
