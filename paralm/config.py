"""The configuration of a run: what each key means, its default, and which combinations are possible.

Files, ``include:``, dotted overrides and the one-line error messages live in :mod:`paralm.config_files`;
this module is the schema alone. Every section refuses unknown keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from paralm.config_base import Section as Section
from paralm.config_base import SourceConfig as SourceConfig
from paralm.config_cluster import ClusterConfig as ClusterConfig
from paralm.config_mixture import MixtureConfig as MixtureConfig
from paralm.config_optimizer import GradientNoiseConfig as GradientNoiseConfig
from paralm.config_optimizer import MuonConfig as MuonConfig
from paralm.config_optimizer import OptimizerConfig as OptimizerConfig
from paralm.config_optimizer import ScheduleConfig as ScheduleConfig
from paralm.config_optimizer import SpikeConfig as SpikeConfig
from paralm.config_optimizer import schedule_steps


class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the folder under root")
    root: Path = Field(default=Path("runs"), description="a file system that every rank sees")
    seed: int = Field(default=0, ge=0, lt=2**63, description="initial weights, data order and RNG derive from it")
    deterministic: bool = Field(default=False, description="torch's deterministic algorithms; slower on a GPU")


class TokenizerConfig(Section):
    """A sentencepiece model, trained on the corpus or given."""

    model: Path | None = Field(default=None, description="an existing sentencepiece .model; nothing is trained then")
    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = Field(default=4096, ge=300, le=2**24)
    sample_bytes: PositiveInt = Field(default=20_000_000, description="text sampled to train on, in bytes")


class LengthConfig(Section):
    """How long a document may be, in characters."""

    min_characters: NonNegativeInt = 0
    max_characters: PositiveInt | None = None

    @model_validator(mode="after")
    def _possible(self) -> LengthConfig:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        return self


class LanguageConfig(Section):
    """Which languages are kept; found by py3langid (paralm[corpus])."""

    keep: list[str] = Field(default_factory=list, description="ISO 639-1 codes, as en; empty: all, undetected")
    min_probability: float = Field(default=0.5, ge=0, le=1, description="less certain documents are left out")


class MinHashConfig(Section):
    """Near-duplicates: a document with an earlier one that shares a whole band of its signature is left out.

    Two documents whose sets of word n-grams have Jaccard similarity s share one with probability
    1 - (1 - s^rows)^bands. The signatures are rensa's (paralm[corpus]).
    """

    enabled: bool = False
    bands: PositiveInt = 14
    rows: PositiveInt = 8
    ngram: PositiveInt = Field(default=5, description="words of a shingle")
    seed: int = Field(default=1, ge=0, lt=2**63)


class StepsConfig(Section):
    """What is done to the documents of data.source before they become tokens, in this order."""

    max_document_bytes: PositiveInt = Field(default=2**30, description="a longer record is a bad one")
    normalize: Literal["none", "nfc", "nfkc"] = Field(default="none", description="Unicode normalisation")
    length: LengthConfig = Field(default_factory=LengthConfig)
    language: LanguageConfig = Field(default_factory=LanguageConfig)
    quality: list[Literal["gopher", "gopher_repetition", "c4"]] = Field(
        default_factory=list, description="rules by which documents are left out"
    )
    exact_duplicates: Literal["drop", "keep"] = Field(default="drop", description="the first of equal texts stays")
    minhash: MinHashConfig = Field(default_factory=MinHashConfig)
    shuffle: Literal["none", "shards"] = Field(default="none", description="the order of input shards in a store")
    shuffle_seed: int = Field(default=0, ge=0, lt=2**63)


class DataConfig(Section):
    """Corpus, tokenizer, token store and the order in which it is read; or a computed task instead of all that."""

    synthetic: dict[str, Any] | None = Field(
        default=None, description="instead of text: the name of a task under 'task', and the task's own settings"
    )
    source: SourceConfig = Field(default_factory=SourceConfig)
    mixture: MixtureConfig | None = Field(default=None, description="instead of source: several, with weights")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    dir: Path | None = Field(default=None, description="tokenizer and stores; default: the run's folder, data/")
    held_out_fraction: float = Field(default=0.02, gt=0, lt=0.5, description="of documents, by content hash")
    validation: dict[str, SourceConfig] = Field(
        default_factory=dict, description="further sets, by name; not of files trained on"
    )
    steps: StepsConfig = Field(default_factory=StepsConfig)
    executor: Literal["local", "shared", "ray", "mpi"] = Field(
        default="local",
        description="what prepares: processes here, processes wherever the same command runs on the same folder, tasks "
        "on a Ray cluster (launcher.address), MPI ranks",
    )
    workers: PositiveInt | None = Field(
        default=None, description="tasks at a time; default: this machine's processors, the cluster's, or all ranks"
    )
    shard_bytes: PositiveInt = Field(default=64 << 20, description="of input that one task reads, about")
    max_bad_records: NonNegativeInt = Field(
        default=0, description="of a source; they are listed in quarantine.jsonl, and one more ends the preparation"
    )
    order: Literal["windows", "lanes"] = "windows"
    verify: Literal["size", "full"] = Field(
        default="full", description="what is checked at a start: sizes, or every byte, by one rank of each node"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> DataConfig:
        for key in ("source", "mixture", "tokenizer", "validation", "steps", "order"):
            if self.synthetic is not None and getattr(self, key) != type(self).model_fields[key].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"'{key}' is of text, and data.synthetic computes its tokens; leave one of them out")
        return self

    @model_validator(mode="after")
    def _mixed(self) -> DataConfig:
        if self.mixture is None:
            return self
        if self.source != SourceConfig():
            raise ValueError("'source' and 'mixture' both say what to read; leave one of them out")
        if self.order != "windows":
            raise ValueError(f"mixture draws windows of several stores; order: {self.order} is of one")
        twice = sorted(set(self.mixture.sources) & set(self.validation))
        if twice:
            raise ValueError(f"'{twice[0]}' is a source of the mixture and a validation set; give one another name")
        if self.validation and all(source.store is not None for source in self.mixture.sources.values()):
            raise ValueError("'validation' needs a source of the mixture that is text; every one is prepared already")
        known = [*self.mixture.sources, *self.validation]
        if self.mixture.target is not None and self.mixture.target not in known:
            raise ValueError(f"mixture.target is '{self.mixture.target}'; it must be one of: {', '.join(known)}")
        return self


class MLPConfig(Section):
    """SwiGLU between the mixers."""

    d_ff: PositiveInt | None = Field(
        default=None, description="default: 8/3 d_model, rounded up to 64; 0 mixers skip it"
    )
    down_init: Literal["scaled", "wang"] = Field(
        default="scaled",
        description="std of the initial projection down: sqrt(2/(5 d_ff)) / sqrt(2 n_layers), or xLSTM's "
        "2 / (n_layers sqrt(d_model))",
    )
    enabled: bool = True


class ModelConfig(Section):
    """A residual stack of (norm → mixer) and (norm → MLP), after an embedding and before a head."""

    d_model: PositiveInt = 256
    n_layers: PositiveInt = 4
    mixer: dict[str, Any] = Field(
        default_factory=lambda: {"name": "paragru"}, description="name and the mixer's own keys; see the registry"
    )
    mixers: list[str | dict[str, Any]] | None = Field(
        default=None,
        description="a hybrid: NAME, NAME*COUNT or {name, count, keys}, repeated over the layers; "
        "keys of `mixer` hold for its name",
    )
    mlp: MLPConfig = Field(default_factory=MLPConfig)
    vocab_size: PositiveInt | None = Field(default=None, description="default: the tokenizer's; larger pads")
    tie_embeddings: bool = True
    embedding_std: PositiveFloat | None = Field(
        default=None, description="of the initial embedding and head; default: 1/sqrt(d_model)"
    )
    embedding_decay: bool = Field(
        default=True, description="whether weight decay applies to the embedding, and so to a head tied to it"
    )
    norm_eps: PositiveFloat = 1e-5
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on each residual branch")
    init: Literal["released", "language_model"] = Field(
        default="language_model", description="of the recurrent vectors: the released code's or the paper's LM recipe"
    )
    loss_chunk: PositiveInt = Field(default=1024, description="tokens whose logits exist at one time")
    z_loss: NonNegativeFloat = 1e-4
    logit_cap: PositiveFloat | None = None


class TrainingConfig(Section):
    """The length and the shape of training."""

    max_steps: PositiveInt = 1000
    seq_len: PositiveInt = 256
    global_batch_size: PositiveInt = Field(default=16, description="sequences a step, over all ranks")
    micro_batch_size: PositiveInt = Field(default=16, description="sequences a rank runs at once")
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool | int | Literal["auto"] = Field(
        default=False,
        description="blocks of which the backward knows the input only and runs them again: all, none, the first so "
        "many, or auto: as few as fit the device's memory, by the plan",
    )
    compile: bool = Field(
        default=False, description="what lies between the mixers (norm, SwiGLU, sum) compiled by torch; not at stage 3"
    )
    carry_state: bool = Field(default=False, description="truncated back-propagation; needs data.order: lanes")
    initial_state: Literal["zero", "passed", "noise"] = Field(
        default="zero",
        description="what rows start from: zeros, the last state of another text (the row's, a step before), or noise "
        "fitted to last states",
    )
    validate_every: int = Field(default=0, ge=0, description="steps; 0: only at the end")
    validate_tokens: PositiveInt = Field(default=65_536, description="tokens of each validation set read each time")
    log_every: PositiveInt = 1
    max_bad_steps: PositiveInt = Field(default=5, description="non-finite steps in a row before training stops")
    stop_after_seconds: PositiveFloat | None = Field(default=None, description="save and leave cleanly (exit code 75)")
    init_from: str | None = Field(
        default=None, description="RUN, RUN@STEP or an export's folder whose weights (only) to start from"
    )
    fork_from: str | None = Field(default=None, description="RUN@STEP to continue from, optimizer and all, in this run")
    hang_timeout: PositiveFloat = Field(default=1800.0, description="seconds without a step before stacks are dumped")
    profile_steps: tuple[int, int] | None = Field(default=None, description="first and last step of a profiler trace")
    threads: PositiveInt | None = Field(default=None, description="torch threads a rank; default: what torch chose")

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or value < 0):
            raise ValueError(f"expected true, false, auto or a number of blocks, got {value}")
        return value

    @field_validator("profile_steps")
    @classmethod
    def _first_to_last(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and max(1, steps[0]) > steps[1]:
            raise ValueError(f"expected [first, last], steps counted from 1, got {list(steps)}")
        return steps


class CheckpointConfig(Section):
    """When checkpoints are written, how, and which are kept.

    Synchronous by default: that takes no memory beside the training's, a step that was saved is saved, and what
    the storage refuses is known at once. With asynchronous writes the loop stalls for a memory copy only.
    """

    every: PositiveInt = Field(default=100, description="steps")
    keep_last: PositiveInt = 2
    keep_every: int = Field(default=0, ge=0, description="steps whose multiples are never removed; 0: none")
    asynchronous: bool = Field(
        default=False, description="write while training goes on; costs host memory of the size of a rank's file"
    )
    on_failure: Literal["continue", "stop"] = Field(
        default="continue", description="when the storage refuses a checkpoint; the last of a run must be written"
    )


class ParallelConfig(Section):
    """How the model is spread over the ranks."""

    zero_stage: int = Field(
        default=1, ge=0, le=3, description="DeepSpeed ZeRO: 0 nothing is cut, 1 optimizer, 2 gradients, 3 weights too"
    )
    time: PositiveInt = Field(
        default=1,
        description="ranks that share each sequence, every one its own part of the time; ranks / time read other rows",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(default="none", description="stages 1 to 3; nvme: 3 only")
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(default="none", description="stage 3 only")
    nvme_path: Path | None = Field(default=None, description="a folder on a local disk of every node")
    overlap_comm: bool | None = Field(
        default=None, description="reduce gradients while the backward runs; default: on a GPU"
    )
    bucket_size: PositiveInt = Field(default=500_000_000, description="elements reduced or gathered at a time, at most")
    collective_timeout: PositiveFloat = Field(
        default=1800.0, description="seconds a rank may keep the others waiting before the attempt is ended"
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="raw keys laid over the generated config")

    @model_validator(mode="after")
    def _consistent(self) -> ParallelConfig:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError("offload_optimizer: nvme needs zero_stage 3")
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise ValueError("offloading to nvme needs nvme_path, a folder on a local disk")
        return self


class LauncherConfig(Section):
    """What starts the ranks, and what happens when they are lost."""

    kind: str = Field(default="local", description="local, torchrun, ray or mpi, or one registered by a module")
    ranks: PositiveInt | None = Field(default=None, description="processes in all; default: one a GPU, otherwise one")
    max_failures: int = Field(default=3, ge=0, description="starts after ranks were lost; the run continues each time")
    preemption: Literal["leave", "restart"] = Field(
        default="leave", description="a rank got SIGTERM, SIGINT or SIGUSR1: save, then exit code 75 or another start"
    )
    stop_grace: PositiveFloat = Field(default=600.0, description="seconds to save after a signal; then ranks are ended")
    nodes: PositiveInt = Field(default=1, description="torchrun: machines that each start this command")
    rendezvous: str | None = Field(
        default=None, pattern=r"^[^:\s]+:\d+$", description="torchrun: HOST:PORT of one node, where nodes meet"
    )
    hosts: str | None = Field(default=None, description="mpi: HOST:SLOTS,...; default: this machine")
    mpirun: list[str] = Field(default_factory=list, description="mpi: further arguments of mpirun")
    max_preemptions: int = Field(default=-1, ge=-1, description="ray: starts after a node was preempted; -1: any")
    address: str | None = Field(default=None, description="ray: an existing cluster; default: one for this run")
    nodes_timeout: PositiveFloat = Field(
        default=900.0,
        description="ray: seconds that nodes which the ranks need may be missing; then training ends",
    )
    cpus_per_rank: PositiveFloat = Field(default=1.0, description="ray: reserved for each rank")
    gpus_per_rank: NonNegativeFloat | None = Field(default=None, description="ray: default: 1 where there are GPUs")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    storage: Path | None = Field(default=None, description="ray: its own notes, shared by nodes; default: in the run")
    dashboard: bool = Field(default=False, description="ray: its dashboard, on 127.0.0.1")
    usage_stats: bool = Field(default=False, description="ray: may report usage to its makers")

    @model_validator(mode="after")
    def _consistent(self) -> LauncherConfig:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError("nodes > 1 needs rendezvous, HOST:PORT of one of them")
        if self.ranks is not None and self.ranks % self.nodes:
            raise ValueError(f"ranks {self.ranks} cannot be spread evenly over {self.nodes} nodes")
        return self


class EvalConfig(Section):
    """The evaluation `paralm run` makes after training."""

    max_tokens: PositiveInt = Field(default=1_000_000, description="held-out tokens to score")
    rows: PositiveInt = Field(default=16, description="documents streamed side by side")
    chunk: PositiveInt = Field(default=512, description="tokens a document advances at a time")
    reset_every: PositiveInt | None = Field(
        default=None, description="start afresh every so many tokens; default: never, or seq_len if the state grows"
    )
    prompts: list[str] = Field(default_factory=lambda: ["def ", "The "])
    sample_tokens: PositiveInt = 120
    temperature: PositiveFloat = 0.8
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)


class Config(Section):
    """Everything one run is made from."""

    run: RunConfig = Field(default_factory=RunConfig)
    imports: list[str] = Field(
        default_factory=list, description="modules or .py files with cells and mixers of your own"
    )
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    launcher: LauncherConfig = Field(default_factory=LauncherConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.run.root / self.run.name

    @property
    def data_dir(self) -> Path:
        """Where the tokenizer and the token stores are."""
        return self.data.dir if self.data.dir is not None else self.run_dir / "data"

    @model_validator(mode="after")
    def _possible(self) -> Config:
        again, layers = self.training.activation_checkpointing, self.model.n_layers
        if isinstance(again, int) and not isinstance(again, bool) and again > layers:
            raise ValueError(f"training.activation_checkpointing is {again} blocks, and model.n_layers {layers}")
        if self.training.compile and not self.model.mlp.enabled:
            raise ValueError(
                "training.compile compiles the MLPs, and model.mlp.enabled is false: mixers are left as they are"
            )
        if self.training.compile and self.model.dropout:
            raise ValueError("training.compile and model.dropout: compiled code draws other numbers; use one of them")
        if self.training.compile and self.parallel.zero_stage == 3:
            raise ValueError(
                "training.compile: at parallel.zero_stage 3 weights come when a module is called, which cannot be "
                "compiled; use stage 0, 1 or 2"
            )
        if self.training.carry_state and self.data.synthetic is not None:
            raise ValueError("training.carry_state is of text: every row of data.synthetic is a whole example")
        if self.training.initial_state != "zero" and self.data.synthetic is not None:
            raise ValueError("training.initial_state is of text: every row of data.synthetic is a whole example")
        if self.training.carry_state and self.data.order != "lanes":
            raise ValueError("training.carry_state needs data.order: lanes (windows are not consecutive)")
        if self.training.carry_state and self.training.initial_state != "zero":
            raise ValueError("training.carry_state and training.initial_state both say what rows start from; give one")
        schedule, steps = self.optimizer.schedule, self.training.max_steps
        warmup, decay = schedule_steps(schedule.warmup, steps), schedule_steps(schedule.decay, steps)
        if schedule.kind == "wsd" and warmup + decay > steps + 1:  # one is rounding's: both are at the peak there
            raise ValueError(
                f"optimizer.schedule: a warm-up of {warmup} and a decay of {decay} steps overlap in training.max_steps "
                f"{steps}"
            )
        return self
