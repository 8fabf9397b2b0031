"""Which jobs a configuration asks for, in order, and the script of each. Nothing is written or submitted here."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paralm.config import Config
from paralm.config_cluster import ArrayJobConfig, EvaluateJobConfig, JobConfig
from paralm.config_files import dump_yaml, load_config
from paralm.errors import ConfigError, RunError
from paralm.user_modules import load_modules
from paralm_launch.cluster import records
from paralm_launch.cluster.render import option, render

_ASKED = {key: key for key in ("time", "partition", "account", "qos", "reservation", "constraint")} | {"mem": "memory"}
STAGES = ("prepare", "train", "evaluate")


@dataclass(frozen=True)
class Planned:
    """A job to be. ``after``: places in the plan of jobs that must have ended well before it."""

    run: Path
    number: int
    name: str
    script: str
    config: str | None  # YAML, beside the script
    tasks: int
    after: tuple[int, ...]
    ending: str  # of the script's file

    def file(self, suffix: str) -> Path:
        return (self.run / "jobs" / f"{records.stem(self.number, self.name)}{suffix}").absolute()


def check(config: Config, stages: Sequence[str]) -> None:
    """Refuse, in one line, what could not work once the job runs. Raises UserError."""
    from paralm.training.engine import deepspeed_config
    from paralm.training.grid import check_ranks
    from paralm_launch import pipeline

    pipeline.check_start(config)
    check_ranks(config, config.cluster.ranks)
    deepspeed_config(config, config.cluster.ranks, 1)
    if "train" in stages and "prepare" not in stages and config.data.synthetic is None:
        from paralm.data_sets import check_prepared

        check_prepared(config.data, config.data_dir)
    if list(stages) == ["prepare"] and config.data.synthetic is not None:
        raise RunError("data.synthetic computes its tokens: there is nothing to prepare")
    if "evaluate" in stages:
        if "train" not in stages and not (config.run_dir / "config.yaml").is_file():
            raise RunError(f"{config.run_dir}: no run to evaluate; train it first, or submit with --pipeline")
        load_modules(config.imports)
        for text in config.cluster.evaluate.what:
            _check_evaluation(config, *text.split())


def _check_evaluation(config: Config, name: str, *settings: str) -> None:
    """As ``paralm eval`` will read it once the run is trained."""
    from paralm.evaluation.suite import get_evaluation
    from paralm.key_values import read_key_values

    if name == "report" and config.data.synthetic is None:
        if bad := [s for s in settings if not s.startswith("eval.")]:
            raise ConfigError(f"cluster.evaluate.what: report takes settings of eval.*, not '{bad[0]}'")
        own = f"eval={json.dumps(config.eval.model_dump(mode='json'))}"
        load_config([], [own, *settings], build=False)
        return
    name = "tracking" if name == "report" else name  # what the report of a run of a task measures
    read_key_values(get_evaluation(name).Settings, f"evaluation '{name}'", settings)


def plan_slurm(config: Config, stages: Sequence[str]) -> list[Planned]:
    """The jobs of ``stages``, each waiting for the stage before it."""
    number = records.next_number(config.run_dir)
    made: list[Planned] = []
    before: tuple[int, ...] = ()
    for stage in STAGES:
        if stage not in stages or (stage == "prepare" and config.data.synthetic is not None):
            continue
        names = [(stage, "", config.cluster.prepare.tasks if stage == "prepare" else 1)]
        if stage == "evaluate":
            names = _evaluations(config.cluster.evaluate)
        first = len(made)
        for name, what, tasks in names:
            draft = Planned(config.run_dir, number + len(made), name, "", None, tasks, before, ".sbatch")
            made.append(_prepare(config, draft) if stage == "prepare" else _train(config, draft))
            if stage == "evaluate":
                made[-1] = _evaluate(config, draft, what)
        before = tuple(range(first, len(made)))
    return made


def _evaluations(settings: EvaluateJobConfig) -> list[tuple[str, str, int]]:
    """(name of the job, what follows ``paralm eval``, tasks) of each; a report is one task."""
    found: list[tuple[str, str, int]] = []
    for text in settings.what:
        first = text.split()[0]
        again = sum(name.startswith(f"evaluate-{first}") for name, _, _ in found)
        found.append(
            (f"evaluate-{first}{again + 1 if again else ''}", text, 1 if first == "report" else settings.tasks)
        )
    return found


def _options(config: Config, draft: Planned, stage: JobConfig, sizes: dict[str, object]) -> list[str]:
    """sbatch's options: what the stage asks for, else what the cluster's section asks for all."""
    cluster = config.cluster
    log = draft.file("-%a.log" if draft.tasks > 1 else ".log")
    fixed = {
        "job-name": f"paralm-{config.run.name}-{draft.name}",
        **sizes,
        **{
            name: value
            for name, key in _ASKED.items()
            if (value := getattr(stage, key) or getattr(cluster, key)) is not None
        },
        "signal": f"B:USR1@{cluster.signal_seconds}",
        "open-mode": "append",
        "chdir": os.getcwd(),
        "output": str(log).replace("%", "%%").replace("%%a.log", "%a.log"),
    }
    if draft.tasks > 1:
        at_once = stage.at_once if isinstance(stage, ArrayJobConfig) else None
        fixed["array"] = f"0-{draft.tasks - 1}{f'%{at_once}' if at_once else ''}"
    lines = [option(name, value) for name, value in fixed.items()]
    return [*lines, "--requeue", *cluster.sbatch, *(stage.sbatch if stage is not cluster else [])]


def _common(config: Config, draft: Planned) -> dict[str, str]:
    return {
        "requeues": str(config.cluster.requeues),
        "events": shlex.quote(str(draft.file(".events"))),
    }


def setup_lines(config: Config) -> list[str]:
    """What puts ``paralm`` on the PATH of a job: the configuration's lines, else the environment that submits."""
    if config.cluster.setup:
        return list(config.cluster.setup)
    return [f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"']


def _gpus(config: Config, count: int) -> dict[str, object]:
    if config.cluster.gres is not None:
        return {"gres": config.cluster.gres}
    return {"gpus-per-node": count} if count else {}


def _train(config: Config, draft: Planned) -> Planned:
    cluster = config.cluster
    ranks = cluster.ranks // cluster.nodes
    sizes: dict[str, object] = {
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        **_gpus(config, cluster.gpus_per_node),
        "cpus-per-task": ranks * cluster.cpus_per_rank,
    }
    settings = {**_common(config, draft), "ranks_per_node": str(ranks), "scratch": cluster.scratch}
    settings["latest"] = shlex.quote(str(config.run_dir.absolute() / "checkpoints" / "latest"))
    if "nvme" in (config.parallel.offload_optimizer, config.parallel.offload_parameters):
        settings["nvme"] = shlex.quote(str(config.parallel.nvme_path))
    template = "train_ray" if cluster.start == "ray" else "train"
    return _made(config, draft, cluster, template, sizes, settings, [str(draft.file(".yaml"))])


def _prepare(config: Config, draft: Planned) -> Planned:
    stage = config.cluster.prepare
    mpi = stage.nodes > 1
    sizes: dict[str, object] = {
        "nodes": stage.nodes,
        "ntasks-per-node": stage.cpus if mpi else 1,
        "cpus-per-task": 1 if mpi else stage.cpus,
    }
    executor = "mpi" if mpi else "shared" if draft.tasks > 1 else "local"
    settings = {**_common(config, draft), "executor": executor}
    return _made(config, draft, stage, "prepare", sizes, settings, [str(draft.file(".yaml"))])


def _evaluate(config: Config, draft: Planned, what: str) -> Planned:
    stage = config.cluster.evaluate
    name, *settings = what.split()
    on_gpus = config.cluster.gpus_per_node > 0 or config.cluster.gres is not None
    gpus = stage.gpus if stage.gpus is not None else int(on_gpus)
    sizes: dict[str, object] = {
        "nodes": 1,
        "ntasks-per-node": 1,
        **({"gres": stage.gres} if stage.gres is not None else {"gpus-per-node": gpus} if gpus else {}),
        "cpus-per-task": stage.cpus,
    }
    arguments = [*([] if name == "report" else [name]), str(config.run_dir.absolute()), *settings]
    return _made(config, draft, stage, "eval", sizes, _common(config, draft), arguments)


def _made(
    config: Config,
    draft: Planned,
    stage: JobConfig,
    template: str,
    sizes: dict[str, object],
    settings: dict[str, str],
    arguments: list[str],
) -> Planned:
    script = render(template, _options(config, draft, stage, sizes), settings, setup_lines(config), arguments)
    yaml = None if template == "eval" else dump_yaml(config)
    return Planned(draft.run, draft.number, draft.name, script, yaml, draft.tasks, draft.after, draft.ending)


# -- Ray -------------------------------------------------------------------------------------------------------


def plan_ray(config: Config, stages: Sequence[str]) -> Planned:
    """One Ray job that does ``stages`` one after the other, on the cluster's head; Ray's jobs wait for none."""
    kinds = [stage for stage in STAGES if stage in stages]
    name = kinds[0] if len(kinds) == 1 else "pipeline"
    draft = Planned(config.run_dir, records.next_number(config.run_dir), name, "", None, 1, (), ".sh")
    ranks, cpus = config.cluster.ranks, config.cluster.cpus_per_rank
    there = 'launcher.address="$RAY_ADDRESS"'
    file = shlex.quote(str(draft.file(".yaml")))
    work = []
    for stage in kinds:
        if stage == "prepare" and config.data.synthetic is None:
            prepare = config.cluster.prepare
            workers = prepare.cpus * prepare.nodes * prepare.tasks
            work.append(f"paralm data prepare {file} data.executor=ray data.workers={workers} {there}")
        elif stage == "train":
            sizes = f"launcher.kind=ray {there} launcher.ranks={ranks} launcher.cpus_per_rank={cpus}"
            if config.cluster.gpus_per_node and config.launcher.gpus_per_rank is None:
                sizes += " launcher.gpus_per_rank=1"  # whether the cluster has a GPU yet or not
            work.append(f"paralm train {file} {sizes}")
        elif stage == "evaluate":
            for text in config.cluster.evaluate.what:
                first, *settings = text.split()
                words = [*([] if first == "report" else [first]), str(config.run_dir.absolute()), *settings]
                more = "" if first == "report" else f" --ray {config.cluster.evaluate.tasks}"
                work.append(f"paralm eval {' '.join(map(shlex.quote, words))}{more}")
    log, events = (shlex.quote(str(draft.file(suffix))) for suffix in (".log", ".events"))
    script = _RAY_SCRIPT.format(
        folder=shlex.quote(os.getcwd()),
        setup="\n".join(setup_lines(config)),
        log=log,
        events=events,
        work="\n".join(work),
    )
    return Planned(draft.run, draft.number, name, script, dump_yaml(config), 1, (), ".sh")


_RAY_SCRIPT = """\
#!/usr/bin/env bash
# What a Ray job of 'paralm submit ray' runs on the cluster's head. Every node sees the folders named here.
set -o pipefail
cd {folder} || exit 2
{setup}

set -u # not before: what loads modules or environments uses variables that are not set
note() {{ echo "$(date +%FT%T%z) $*" >>{events}; }}
# A stop asks every process at once: the one that writes the log waits for the last word, this one for the last code.
exec > >(trap "" TERM; exec tee -a {log}) 2>&1
trap : TERM
note start
set -e
trap 'code=$?; note "end code=$code"; exit "$code"' EXIT
{work}
"""
