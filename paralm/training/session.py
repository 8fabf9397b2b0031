"""A training session: everything one attempt holds, how it is set up, restored, saved and taken down."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from paralm_data import DataError, Loader, Tokenizer, TokenStore

from paralm.config import Config
from paralm.config_files import dump_yaml, frozen_differences
from paralm.errors import CheckpointError, ConfigError, RunError, UserError
from paralm.models import build_model
from paralm.training import checkpoint as ckpt
from paralm.training import rng
from paralm.training.engine import build_engine, device, rank_and_world, start_distributed
from paralm.training.fragments import MASTER, EngineFragments
from paralm.training.metrics import MetricsWriter
from paralm.training.optimizers import build_optimizer
from paralm.training.run_folder import RunFolder
from paralm.training.step import Stepper


def parse_run(text: str | Path, root: Path | None = None) -> tuple[Path, int | None]:
    """``RUN`` or ``RUN@STEP`` as (folder, step); a bare name is looked for under ``root`` too."""
    name, at, step = str(text).rpartition("@")
    if not at or "/" in step or Path(text).is_dir():
        name, step = str(text), ""
    if step and not step.isdigit():
        raise RunError(f"{text}: what follows '@' must be a step number")
    path = Path(name)
    if not path.exists() and root is not None and (root / name).exists():
        path = root / name
    if not path.is_dir():
        raise RunError(f"{path}: no such run folder")
    return path, int(step) if step else None


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


class Session:
    """One attempt at a run. Built by :meth:`open`; :meth:`close` must be called."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.folder = RunFolder(config.run_dir)
        self.rank, self.world_size = rank_and_world()
        self.device = device()
        self.step = 0
        self.bad_steps = 0
        self.bad_in_row = 0
        self.started = time.monotonic()
        self.metrics: MetricsWriter | None = None

    # -- setting up ------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, config: Config, say: Callable[[str], None] = print) -> Session:
        """Join the group, claim the run folder, build model and engine, and restore the newest checkpoint."""
        session = cls(config, say)
        session._check_before_anything()
        start_distributed(timeout=config.training.hang_timeout)
        try:
            session._claim_folder()
            session._find_checkpoint()
            session._set_threads()
            session._together(session._open_data)
            session._together(session._open_metrics)
            session._build()
            session._restore()
        except BaseException:
            session.close()
            raise
        return session

    def _together(self, work: Callable[[], None]) -> None:
        """Do ``work`` on every rank; if it fails on any, all of them end with its one line instead of waiting."""
        problem: Exception | None = None
        try:
            work()
        except (UserError, DataError, OSError) as error:
            problem = error
        found = [text for text in gather(str(problem) if problem else None) if text]
        if problem is not None:
            raise problem
        if found:
            raise RunError(found[0])

    def _open_metrics(self) -> None:
        if self.rank == 0:
            self.metrics = MetricsWriter(self.folder.metrics, self.folder.tensorboard, self.step)

    def _check_before_anything(self) -> None:
        """What can be refused without writing a byte."""
        self.folder.check_same_run(self.config, frozen_differences)
        for key in ("init_from", "fork_from"):
            source = getattr(self.config.training, key)
            if source is not None:
                parse_run(source, self.config.run.root)
        if self.config.training.fork_from and self.config.training.init_from:
            raise ConfigError("training.fork_from and training.init_from cannot both be given")
        for name in ("tokenizer.model", "train", "held_out"):
            if not (self.config.data_dir / name).exists():
                raise RunError(f"{self.config.data_dir / name}: missing; run 'paralm data prepare' first")

    def _claim_folder(self) -> None:
        attempt: Any = None
        if self.rank == 0:
            try:
                self.folder.path.mkdir(parents=True, exist_ok=True)
                attempt = self.folder.begin_attempt()
                ckpt.write_atomically(self.folder.config_file, dump_yaml(self.config))
                self.folder.checkpoints.mkdir(exist_ok=True)
            except OSError as error:
                attempt = f"{self.folder.path}: cannot be written: {error.strerror or error}"
        attempt = broadcast(attempt)
        if isinstance(attempt, str):
            raise RunError(attempt)
        self.attempt: int = attempt
        problems = [p for p in gather(self.folder.prove_shared(self.rank, broadcast)) if p]
        if self.rank == 0:
            self.folder.end_proof()
        if problems:
            raise RunError(problems[0])

    def _find_checkpoint(self) -> None:
        """The checkpoint to continue from: this run's newest whole one, or the one it is forked from."""
        self.checkpoint: ckpt.Checkpoint | None = None
        self.forked = False
        choice: Any = None
        if self.rank == 0:
            try:
                found = ckpt.newest_whole(self.folder.checkpoints, self._warn)
                ckpt.remove_unfinished(self.folder.checkpoints)
                if found is None and self.config.training.fork_from:
                    path, step = parse_run(self.config.training.fork_from, self.config.run.root)
                    found = open_checkpoint(path, step, self._warn)
                choice = found.directory if found else None
            except UserError as error:
                choice = str(error)
        choice = broadcast(choice)
        if isinstance(choice, str):
            raise CheckpointError(choice)
        if choice is not None:
            self.checkpoint = ckpt.Checkpoint(choice)
            self.forked = choice.parent != self.folder.checkpoints
            self.step = self.checkpoint.step
            if self.forked and self.step >= self.config.training.max_steps:
                raise ConfigError(
                    f"training.max_steps is {self.config.training.max_steps}, but training.fork_from starts at step "
                    f"{self.step}; raise max_steps"
                )

    def _warn(self, message: str) -> None:
        self.say(f"warning: {message}")

    def _set_threads(self) -> None:
        """Losses are bit-equal only at equal thread counts: a run keeps the count it was started with."""
        wanted = self.config.training.threads
        recorded = self.checkpoint.manifest["threads"] if self.checkpoint else None
        if wanted is None and recorded is not None:
            wanted = recorded
        if wanted is not None:
            torch.set_num_threads(wanted)
        if recorded is not None and recorded != torch.get_num_threads():
            self._warn(f"{torch.get_num_threads()} threads, the checkpoint had {recorded}: last bits may differ")
        if self.config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses on a GPU
            torch.use_deterministic_algorithms(True)

    def _open_data(self) -> None:
        training, data = self.config.training, self.config.data
        self.tokenizer = Tokenizer.load(self.config.data_dir / "tokenizer.model")
        self.store = TokenStore.open(self.config.data_dir / "train", verify=data.verify)
        self.validation = {"held_out": TokenStore.open(self.config.data_dir / "held_out", verify=data.verify)}
        for name in data.validation:
            path = self.config.data_dir / "validation" / name
            self.validation[name] = TokenStore.open(path, verify=data.verify)
        for store in (self.store, *self.validation.values()):
            if store.tokenizer_sha256 != self.tokenizer.sha256:
                raise RunError(f"{store.path}: made with another tokenizer than the one in {self.config.data_dir}")
        self.loader = Loader(
            self.store,
            seq_len=training.seq_len,
            global_batch_size=training.global_batch_size,
            seed=self.config.run.seed,
            order=data.order,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _build(self) -> None:
        config = self.config
        rng.seed_all(config.run.seed, "build")
        model = build_model(config.model, self.tokenizer.vocab_size, seed=config.run.seed)
        model.set_activation_checkpointing(config.training.activation_checkpointing)
        if config.training.carry_state and not model.bounded_state:
            raise ConfigError(
                f"training.carry_state: the state of mixer '{config.model.mixer['name']}' grows with the "
                "sequence; use a recurrent mixer"
            )
        self.parameters = sum(p.numel() for p in model.parameters())
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        bf16 = config.training.precision == "bf16"
        # The masters keep the initial values in fp32; the engine would clone them from the rounded weights.
        initial = {n: p.detach().clone() for n, p in model.named_parameters()} if bf16 else None
        if bf16:
            model.to(torch.bfloat16)
        model.to(self.device)
        optimizer = build_optimizer(model.parameter_groups(), config.optimizer)
        self.engine = build_engine(model, optimizer, config, self.world_size)
        self.model = self.engine.module
        self.fragments = EngineFragments(self.engine)
        self.stepper = Stepper(self.engine, config, self.device, self.rank, self.world_size)
        if initial is not None:
            self.fragments.load(lambda _, name, at, count: initial[name].flatten()[at : at + count], [], {})

    # -- restoring -------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        seed = self.config.run.seed
        rng.seed_all(seed, "train", self.step, self.rank)
        if self.checkpoint is None:
            if self.config.training.init_from:
                self._start_from(*parse_run(self.config.training.init_from, self.config.run.root))
            return
        source, manifest = self.checkpoint, self.checkpoint.manifest
        self._check_shapes(source)
        if manifest["optimizer"]["name"] != self.config.optimizer.name:
            raise CheckpointError(
                f"{source.directory}: made with optimizer '{manifest['optimizer']['name']}', "
                f"not '{self.config.optimizer.name}'; use training.init_from to take its weights only"
            )
        self.fragments.load(source.read, manifest["optimizer"]["tensor_keys"], manifest["optimizer"]["scalars"])
        if self.forked:
            self.loader.step = self.step
        else:
            self.loader.load_state_dict(manifest["loader"])
            self.bad_steps, self.bad_in_row = manifest["bad_steps"], manifest["bad_in_row"]
        if source.world_size == self.world_size:
            rng.restore(source.rank_tensors(self.rank, "rng"))
        theirs, mine = manifest["loader"], self.loader.state_dict()
        same_order = all(theirs.get(key) == mine[key] for key in mine if key != "step")
        if self.config.training.carry_state and manifest["carried"] and same_order:
            self._restore_carried(source)

    def _check_shapes(self, source: ckpt.Checkpoint) -> None:
        theirs = source.shapes
        for name in sorted(set(theirs) | set(self.shapes)):
            if theirs.get(name) != self.shapes.get(name):
                raise CheckpointError(
                    f"{source.directory}: parameter {name} is {theirs.get(name, 'absent')} there and "
                    f"{self.shapes.get(name, 'absent')} in this model; the model sections must agree"
                )

    def _start_from(self, path: Path, step: int | None) -> None:
        """Weights of another run, nothing else of it."""
        choice: Any = None
        if self.rank == 0:
            try:
                choice = open_checkpoint(path, step, self._warn).directory
            except UserError as error:
                choice = str(error)
        choice = broadcast(choice)
        if isinstance(choice, str):
            raise CheckpointError(choice)
        source = ckpt.Checkpoint(choice)
        self._check_shapes(source)
        self.fragments.load(source.read, [], {})

    def _rows(self, rank: int, world_size: int) -> range:
        rows = self.config.training.global_batch_size
        return range(rows * rank // world_size, rows * (rank + 1) // world_size)

    def _restore_carried(self, source: ckpt.Checkpoint) -> None:
        """Carried states belong to global rows: this rank takes its rows from whichever rank wrote them."""
        mine = self._rows(self.rank, self.world_size)
        parts: dict[str, list[torch.Tensor]] = {}
        for rank in range(source.world_size):
            theirs = self._rows(rank, source.world_size)
            low, high = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
            if low < high:
                for key, value in source.rank_tensors(rank, "carried").items():
                    parts.setdefault(key, []).append(value[low - theirs.start : high - theirs.start])
        if parts:
            leaves = [torch.cat(parts[key]) for key in sorted(parts)]
            self.stepper.set_carried(leaves, self.model.initial_state(1, self.device))

    # -- saving ----------------------------------------------------------------------------------------------

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        own = {f"rng/{key}": value for key, value in rng.capture().items()}
        carried = self.stepper.carried_rows(len(self._rows(self.rank, self.world_size)))
        for index, leaf in enumerate(carried or []):
            own[f"carried/{index:05d}"] = leaf
        return own

    def _fragment_tensors(self) -> Any:
        for fragment in self.fragments:
            yield MASTER, fragment.name, fragment.offset, fragment.view(fragment.flat)
            for key, tensor in self.fragments.tensor_state(fragment.flat).items():
                yield key, fragment.name, fragment.offset, fragment.view(tensor)

    def save(self) -> bool:
        """Write a checkpoint of ``step`` finished steps; returns whether it was written.

        When the storage refuses, the previous checkpoints stay and training goes on; the reason is said.
        """
        if self.superseded():
            return False
        directory = self.folder.checkpoints / ckpt.step_name(self.step)
        if self.rank == 0:
            if (directory / ckpt.MANIFEST).exists():
                ckpt.remove(directory)  # of an earlier course of this run, found damaged when it was resumed
            if self.metrics is not None:
                self.metrics.sync()
        dist.barrier()
        try:
            mine: Any = ckpt.write_rank_file(directory, self.rank, self._fragment_tensors(), self._own_tensors())
        except OSError as error:
            mine = f"rank {self.rank}: {error}"
        files = gather(mine)
        problems = [f for f in files if isinstance(f, str)]
        if self.rank == 0 and not problems:
            try:
                ckpt.write_manifest(directory, files, self._manifest())
            except OSError as error:
                problems = [f"{directory}: {error}"]
        problems = broadcast(problems)
        if problems:
            if self.rank == 0:
                ckpt.remove(directory)
            self._warn(f"checkpoint of step {self.step} not written, the previous one stays: {problems[0]}")
        elif self.rank == 0:
            keep = self.config.checkpoint
            ckpt.apply_retention(self.folder.checkpoints, keep.keep_last, keep.keep_every, self.step)
        return not problems

    def _manifest(self) -> dict[str, Any]:
        keys = sorted({k for flat in self.fragments.flats for k in self.fragments.tensor_state(flat)})
        training = self.config.training
        return {
            "step": self.step,
            "tokens": self.step * training.global_batch_size * training.seq_len,
            "world_size": self.world_size,
            "zero_stage": self.config.parallel.zero_stage,
            "threads": torch.get_num_threads(),
            "bad_steps": self.bad_steps,
            "bad_in_row": self.bad_in_row,
            "carried": training.carry_state,
            "optimizer": {
                "name": self.config.optimizer.name,
                "tensor_keys": keys,
                "scalars": self.fragments.scalar_state(),
            },
            "parameters": {name: {"shape": list(shape)} for name, shape in self.shapes.items()},
            "loader": self.loader.state_dict(),
            "tokenizer_sha256": self.tokenizer.sha256,
            "vocab_size": self.tokenizer.vocab_size,
        }

    # -- the rest --------------------------------------------------------------------------------------------

    def superseded(self) -> bool:
        """Whether a later attempt at this run has begun; decided by rank 0 for all."""
        return bool(broadcast(self.folder.superseded(self.attempt) if self.rank == 0 else None))

    def write(self, row: dict[str, Any]) -> None:
        """Metrics, on rank 0."""
        if self.metrics is not None:
            self.metrics.write(row)

    def close(self) -> None:
        """Take the engine down; nothing is written."""
        if self.metrics is not None:
            self.metrics.close()
        engine = getattr(self, "engine", None)
        if engine is not None:
            with contextlib.suppress(Exception):  # DeepSpeed's own tear-down must not hide the error in hand
                engine.destroy()


def open_checkpoint(run: Path, step: int | None, warn: Callable[[str], None]) -> ckpt.Checkpoint:
    """A run's checkpoint, verified: of a step, or the newest whole one."""
    checkpoints = run / "checkpoints"
    if step is not None:
        return ckpt.open_step(checkpoints, step).verify()
    found = ckpt.newest_whole(checkpoints, warn)
    if found is None:
        raise CheckpointError(f"{run}: no checkpoint yet; train the run first")
    return found
