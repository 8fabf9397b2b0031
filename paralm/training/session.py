"""A training session: everything one attempt holds, how it is set up, restored, saved and taken down."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from paralm_data import Ahead, DataError, Loader, MixtureLoader, SyntheticLoader, Tokenizer, TokenStore

from paralm.config import Config
from paralm.config_files import dump_yaml, frozen_differences, rank_differences
from paralm.data_sets import check_prepared, open_loader, validation_paths
from paralm.errors import CheckpointError, ConfigError, RunError, UserError
from paralm.export import Exported, is_export
from paralm.models import build_model
from paralm.models.mixers.base import shard_time
from paralm.models.parameters import initial_value, specs
from paralm.synthetic import task_of
from paralm.training import checkpoint as ckpt
from paralm.training import rng
from paralm.training.alignment import Alignment, Learner
from paralm.training.engine import build_engine
from paralm.training.fragments import EngineFragments
from paralm.training.grid import Grid, check_ranks
from paralm.training.initial_states import check_states
from paralm.training.metrics import MetricsWriter
from paralm.training.rendezvous import device, rank_and_world, start_distributed
from paralm.training.run_folder import RunFolder
from paralm.training.saving import Saver
from paralm.training.schedule import rate_change
from paralm.training.step import Stepper
from paralm.training.together import broadcast, gather
from paralm.training.verification import FindDamage, choose_together, first_on_node, verify_stores
from paralm.training.watch import note
from paralm.user_modules import digests, edited, load_modules


def parse_run(text: str | Path, root: Path | None = None) -> tuple[Path, int | None]:
    """``RUN`` or ``RUN@STEP`` as (folder, step); a bare name is looked for under ``root`` too."""
    name, at, step = str(text).rpartition("@")
    if not at or "/" in step or Path(text).is_dir():
        name, step = str(text), ""
    if step and not step.isdecimal():
        raise RunError(f"{text}: what follows '@' must be a step number")
    path = Path(name)
    if not path.exists() and root is not None and (root / name).exists():
        path = root / name
    if not path.is_dir():
        raise RunError(f"{path}: no such run folder")
    return path, int(step) if step else None


def check_sources(config: Config) -> None:
    """Refuse a run to start from that is not there. One that continues from a checkpoint of its own needs none."""
    if ckpt.has_steps(config.run_dir / "checkpoints"):
        return
    for source in (config.training.init_from, config.training.fork_from):
        if source is not None:
            parse_run(source, config.run.root)


class Session:
    """One attempt at a run. Built by :meth:`open`; :meth:`close` must be called."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.folder = RunFolder(config.run_dir)
        self.rank, self.world_size = rank_and_world()
        self.grid = Grid(self.rank, self.world_size, config.parallel.time)
        self.device = device()
        self.step = 0
        self.tokens = 0  # trained on; of a forked run, with those of the run before it
        self.bad_steps = 0
        self.bad_in_row = 0
        self.spikes = 0
        self.owes_validation = False  # of the step that was saved
        self._metrics_refused = False
        self.modules: dict[str, str] = {}  # digests of what this attempt computes with
        self.started = time.monotonic()
        self.metrics: MetricsWriter | None = None
        self.stores: list[TokenStore] = []  # of text: those that are trained and validated on
        self.saver, self.ahead = Saver(self), Ahead()

    # -- setting up ------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, config: Config, say: Callable[[str], None] = print) -> Session:
        """Join the group, claim the run folder, build model and engine, and restore the newest checkpoint."""
        session = cls(config, say)
        refusal: Exception | None = None
        try:
            session._check_before_anything()
        except (UserError, DataError, OSError) as error:  # of this node alone, perhaps: the others hear of it
            refusal = error
        start_distributed(config.parallel.collective_timeout, refusal)
        try:
            session._claim_folder()
            note("load")
            session._find_checkpoint()
            session._set_threads()
            session._together(session._open_data)
            session._check_alike(*broadcast((config, session.loader.state_dict(), session.modules)))
            reads = first_on_node(session.rank)
            session._together(lambda: verify_stores(config, session.stores, reads, session.say))
            session._together(session._open_metrics)
            note("start")
            session._build()
            note("load")
            session._restore()
            if session.learner is not None:
                session.learner.begin(session.step)
            session.saver.prepare()
        except BaseException:
            session.close()
            raise
        return session

    def _together(self, work: Callable[[], object]) -> None:
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

    def _check_alike(self, config: Config, read: dict[str, Any], modules: dict[str, str]) -> None:
        """Refuse ranks that were told otherwise than rank 0, or read otherwise: nothing would tell from the losses."""

        def compare() -> None:
            different, mine = rank_differences(config, self.config), self.loader.state_dict()
            different += [(f"its data's {key}", read.get(key), mine[key]) for key in mine if read.get(key) != mine[key]]
            files = zip_longest(modules.values(), self.modules.values())
            different += [("the SHA-256 of a file of imports", theirs, own) for theirs, own in files if theirs != own]
            if different:
                key, theirs, own = different[0]
                raise RunError(
                    f"rank {self.rank} on {socket.gethostname()}: {key} is {own!r}, of rank 0 {theirs!r}; every node "
                    "needs the same command and the same data"
                )

        self._together(compare)

    def _open_metrics(self) -> None:
        if self.rank == 0:
            owed = self.checkpoint is not None and self.checkpoint.manifest.get("owes_validation", False)
            self.metrics = MetricsWriter(self.folder.metrics, self.folder.tensorboard, self.step, owed)

    def _check_before_anything(self) -> None:
        """What can be refused without writing a byte."""
        load_modules(self.config.imports)
        self.modules = digests(self.config.imports)
        check_ranks(self.config, self.world_size)
        self.folder.check_same_run(self.config, frozen_differences)
        check_sources(self.config)
        if self.config.training.fork_from and self.config.training.init_from:
            raise ConfigError("training.fork_from and training.init_from cannot both be given")
        if self.config.data.synthetic is None:
            check_prepared(self.config.data, self.config.data_dir)

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

        def choose(find_damage: FindDamage) -> ckpt.Checkpoint | None:
            found = ckpt.newest_whole(self.folder.checkpoints, self.warn, find_damage)
            ckpt.remove_unfinished(self.folder.checkpoints)
            if found is not None:
                ckpt.pass_over(self.folder.checkpoints, found.step)
            if found is None and self.config.training.fork_from:
                path, step = parse_run(self.config.training.fork_from, self.config.run.root)
                found = open_checkpoint(path, step, self.warn, find_damage)
            return found

        self.checkpoint = choose_together(self.rank, self.world_size, choose)
        self.forked = False
        if self.checkpoint is not None:
            self.forked = self.checkpoint.directory.parent != self.folder.checkpoints
            self.step, self.tokens = self.checkpoint.step, self.checkpoint.manifest["tokens"]
            if self.forked and self.step >= self.config.training.max_steps:
                raise ConfigError(
                    f"training.max_steps is {self.config.training.max_steps}, but training.fork_from starts at step "
                    f"{self.step}; raise max_steps"
                )

    def warn(self, message: str) -> None:
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
            self.warn(f"{torch.get_num_threads()} threads, the checkpoint had {recorded}: last bits may differ")
        if self.config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses on a GPU
            torch.use_deterministic_algorithms(True)

    def _open_data(self) -> None:
        training, data, seed = self.config.training, self.config.data, self.config.run.seed
        rows = (training.seq_len, training.global_batch_size, seed)
        self.task = task_of(data)
        self.loader: Loader | MixtureLoader | SyntheticLoader
        self.validation: dict[str, TokenStore]
        if self.task is not None:
            self.vocab_size, self.tokenizer_sha256, self.validation = self.task.vocab_size, self.task.fingerprint, {}
            self.loader = SyntheticLoader(self.task, *rows, **self.grid.reads(training.seq_len))
            return
        folder = self.config.data_dir
        tokenizer = Tokenizer.load(folder / "tokenizer.model")
        self.vocab_size, self.tokenizer_sha256 = tokenizer.vocab_size, tokenizer.sha256
        self.loader = open_loader(self.config, folder, **self.grid.reads(training.seq_len))
        found = validation_paths(data, folder)
        self.validation = {name: TokenStore.open(path, verify="size") for name, path in found.items()}
        read = [s.store for s in self.loader.sources] if isinstance(self.loader, MixtureLoader) else [self.loader.store]
        self.stores = list({store.path: store for store in (*read, *self.validation.values())}.values())
        for store in self.stores:
            if store.tokenizer_sha256 != tokenizer.sha256:
                raise RunError(f"{store.path}: made with another tokenizer than the one in {folder}")
        self._check_target()

    def _check_target(self) -> None:
        mixture = self.config.data.mixture
        if mixture is None or mixture.target is None:
            return
        if mixture.target not in self.validation:
            raise ConfigError(
                f"data.mixture.target: source '{mixture.target}' has no held-out part; name a set that has: "
                f"{', '.join(self.validation)}"
            )
        target, least = self.validation[mixture.target], self.config.training.seq_len + 1
        if target.n_tokens < least:
            raise ConfigError(
                f"data.mixture.target: {target.path} has {target.n_tokens} tokens, less than one window of seq_len + 1 "
                f"= {least}; hold more out, or name another set"
            )

    def _build(self) -> None:
        """The engine, its weights still zero, and what is known of the model from its shapes alone."""
        config = self.config
        rng.whole_float32()
        rng.seed_all(config.run.seed, "build")
        self.blueprint = build_model(config.model, self.vocab_size, seed=config.run.seed, device="meta")
        check_states(config, self.blueprint)
        self.parameters = sum(p.numel() for p in self.blueprint.parameters())
        self.shapes = {name: tuple(p.shape) for name, p in self.blueprint.named_parameters()}
        self.engine, self.optimizer = build_engine(config, self.vocab_size, self.world_size)
        self.model = self.engine.module
        if config.training.activation_checkpointing == "auto" and self.rank == 0:
            self.say(
                f"training.activation_checkpointing: auto: {self.model.checkpointed} of {config.model.n_layers} blocks "
                "run again in the backward"
            )
        self.fragments = EngineFragments(self.engine, self.rank, self.world_size)
        self.optimizer.bind(self.fragments, self.shapes, self.device)
        self.shards = self.grid.shards(config.parallel.collective_timeout)
        self.stepper = Stepper(self.engine, self.optimizer, config, self.device, self.grid)
        self.learner: Learner | None = None
        if isinstance(self.loader, MixtureLoader) and config.data.mixture is not None and config.data.mixture.target:
            target = self.validation[config.data.mixture.target]
            self.learner = Learner(self.loader, Alignment(self.engine, config, self.loader, target, self.device))

    # -- restoring -------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        seed = self.config.run.seed
        rng.seed_all(seed, "train", self.step, self.rank)
        if self.checkpoint is None:
            if self.config.training.init_from:
                self._start_from(*parse_run(self.config.training.init_from, self.config.run.root))
            else:
                self._start_afresh()
            return
        source, manifest = self.checkpoint, self.checkpoint.manifest
        self._check_shapes(source)
        if self.rank == 0 and (found := edited(self.modules, manifest)):
            self.warn(f"{source.directory}: {found}")
        if manifest["optimizer"]["name"] != self.config.optimizer.name:
            raise CheckpointError(
                f"{source.directory}: made with optimizer '{manifest['optimizer']['name']}', "
                f"not '{self.config.optimizer.name}'; use training.init_from to take its weights only"
            )
        with source.kept_open():
            self.fragments.load(source.read, source.optimizer_kinds, manifest["optimizer"]["scalars"])
        if self.forked:
            self.loader.start_at(self.step)
            change = rate_change(source.directory.parent.parent, self.config, self.step)
            if change is not None and self.rank == 0:
                self.say(change)
        else:
            self.loader.load_state_dict(manifest["loader"])
            self.bad_steps, self.bad_in_row = manifest["bad_steps"], manifest["bad_in_row"]
            self.spikes = manifest.get("spikes", 0)
            self.owes_validation = manifest.get("owes_validation", False)
            self.stepper.spikes.load(manifest.get("losses", []))
        if self.stepper.noise is not None:
            self.stepper.noise.load(manifest.get("state_noise"))
        if source.world_size == self.world_size:
            rng.restore(source.rank_tensors(self.rank, "rng"))
        mine = self.draws
        before = {**mine, "ranks": source.world_size, **manifest.get("draws", {})}
        other = [f"{key} {before[key]} before, {mine[key]} now" for key in mine if before[key] != mine[key]]
        if self.config.model.dropout and other and self.rank == 0:
            self.warn(
                f"{', '.join(other)}: model.dropout draws other numbers from here on; without dropout the losses would "
                "be the same"
            )
        theirs, ours = manifest["loader"], self.loader.state_dict()
        same_order = all(theirs.get(key) == ours[key] for key in ours if key != "step")
        if self.stepper.carry and manifest["carried"] and same_order:
            self._restore_carried(source)

    def _check_shapes(self, source: ckpt.Checkpoint | Exported) -> None:
        theirs, where = source.shapes, source.path if isinstance(source, Exported) else source.directory
        for name in sorted(set(theirs) | set(self.shapes)):
            if theirs.get(name) != self.shapes.get(name):
                raise CheckpointError(
                    f"{where}: parameter {name} is {theirs.get(name, 'absent')} there and "
                    f"{self.shapes.get(name, 'absent')} in this model; the model sections must agree"
                )

    def _start_from(self, path: Path, step: int | None) -> None:
        """Weights of another run or of an export, nothing else of it."""
        if is_export(path):
            if step is not None:
                raise CheckpointError(f"{path}: an export has no steps; leave @{step} out")
            exported = Exported(path)
            damage = next((found for found in gather(exported.damage(self.rank, self.world_size)) if found), None)
            if damage:
                raise CheckpointError(damage)
            self._check_shapes(exported)
            self.fragments.load(exported.read, lambda name: (), {})
            return
        source = choose_together(
            self.rank, self.world_size, lambda find_damage: open_checkpoint(path, step, self.warn, find_damage)
        )
        assert source is not None  # open_checkpoint finds one or raises
        self._check_shapes(source)
        with source.kept_open():
            self.fragments.load(source.read, lambda name: (), {})

    def _start_afresh(self) -> None:
        """Initial values: each rank makes whole only the parameters it has a part of, one at a time."""
        known = {name: spec for name, _, spec in specs(self.blueprint)}

        def read(kind: str, name: str, offset: int, numel: int) -> torch.Tensor:
            value = initial_value(name, self.shapes[name], known[name], self.config.run.seed)
            return value.view(-1)[offset : offset + numel]

        self.fragments.load(read, lambda name: (), {})

    @contextlib.contextmanager
    def over_time(self) -> Iterator[None]:
        """Within it the model takes this rank's part of its sequences' time; outside, whole sequences."""
        shard_time(self.model, self.shards)
        try:
            yield
        finally:
            shard_time(self.model, None)

    def rows(self, rank: int, world_size: int) -> range:
        rows = self.config.training.global_batch_size
        return range(rows * rank // world_size, rows * (rank + 1) // world_size)

    def _restore_carried(self, source: ckpt.Checkpoint) -> None:
        """Carried states belong to global rows: this rank takes its rows from whichever rank wrote them."""
        mine = self.rows(self.rank, self.world_size)
        parts: dict[str, list[torch.Tensor]] = {}
        for rank in range(source.world_size):
            theirs = self.rows(rank, source.world_size)
            low, high = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
            if low < high:
                for key, value in source.rank_tensors(rank, "carried").items():
                    parts.setdefault(key, []).append(value[low - theirs.start : high - theirs.start])
        if parts:
            leaves = [torch.cat(parts[key]) for key in sorted(parts)]
            self.stepper.set_carried(leaves, self.model.initial_state(1, self.device))

    @property
    def draws(self) -> dict[str, int]:
        """By which numbers a row's dropout is decided, beside the step."""
        config = self.config
        time, micro = config.parallel.time, config.training.micro_batch_size
        return {"ranks": self.world_size, "parallel.time": time, "training.micro_batch_size": micro}

    # -- saving ----------------------------------------------------------------------------------------------

    def save(self, wait: bool = True) -> bool:
        """Write a checkpoint of ``step`` finished steps; see :meth:`paralm.training.saving.Saver.save`."""
        return self.saver.save(wait)

    # -- the rest --------------------------------------------------------------------------------------------

    def superseded(self) -> bool:
        """Whether a later attempt at this run has begun; decided by rank 0 for all."""
        return bool(broadcast(self.folder.superseded(self.attempt) if self.rank == 0 else None))

    def write(self, row: dict[str, Any]) -> None:
        """Metrics, on rank 0, and what a checkpoint written meanwhile has come to."""
        self.saver.report()
        if self.metrics is None:
            return
        try:
            self.metrics.write(row)
        except OSError as error:  # training can do without; a checkpoint that cannot be written is another matter
            self._metrics_refusal(error)

    def _metrics_refusal(self, error: OSError) -> None:
        if not self._metrics_refused:
            where = error.filename or self.folder.metrics
            self.warn(f"{where}: a row could not be written: {error.strerror or error}")
        self._metrics_refused = True

    def close(self) -> None:
        """Take the engine down; nothing is begun, but a checkpoint that is being written is finished."""
        self.saver.close()
        self.ahead.close()
        if self.metrics is not None:
            try:
                self.metrics.close()
            except OSError as error:  # how training ended must not be hidden by it
                self._metrics_refusal(error)
        engine = getattr(self, "engine", None)
        if engine is not None:
            with contextlib.suppress(Exception):  # DeepSpeed's own tear-down must not hide the error in hand
                engine.destroy()


def open_checkpoint(
    run: Path,
    step: int | None,
    warn: Callable[[str], None],
    find_damage: FindDamage = ckpt.Checkpoint.damage,
) -> ckpt.Checkpoint:
    """A run's checkpoint, verified: of a step, or the newest whole one."""
    checkpoints = run / "checkpoints"
    if step is not None:
        return ckpt.open_step(checkpoints, step).verify(find_damage)
    found = ckpt.newest_whole(checkpoints, warn, find_damage)
    if found is None:
        raise CheckpointError(f"{run}: no checkpoint yet; train the run first")
    return found
