"""``paralm submit``, ``status``, ``logs`` and ``cancel``: a run as jobs of SLURM or Ray."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paralm.errors import RunError
from paralm_launch.commands.arguments import ConfigArgument, OverridesArgument, add_command
from paralm_launch.console import say, table

if TYPE_CHECKING:
    from paralm.config import Config
    from paralm_launch.cluster.plan import Planned
    from paralm_launch.cluster.records import Job
    from paralm_launch.cluster.slurm import Status

app = typer.Typer(no_args_is_help=True, help="Submit a run to SLURM, or to a Ray cluster.")

_SiteOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The site's settings, a YAML file with 'cluster:'; default: PARALM_SITE's."),
]
_DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the scripts; write and submit nothing.")]
_PipelineOption = Annotated[bool, typer.Option("--pipeline", help="Prepare, then train, then evaluate.")]
_StageOption = Annotated[
    list[str] | None, typer.Option("--stage", help="prepare, train or evaluate; several times for several.")
]
_FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Stay, and show what the last job says.")]
_RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="RUN|ID", help="Runs' folders or names, or ids of jobs.")
]
_RootOption = Annotated[Path, typer.Option(help="The folder of runs in which names and ids are looked for.")]
_RUNS = Path("runs")


def add_to(parent: typer.Typer) -> None:
    """Add the commands to the application."""
    parent.add_typer(app, name="submit")
    add_command(app, submit_slurm, "slurm")
    add_command(app, submit_ray, "ray")
    add_command(parent, status)
    add_command(parent, logs)
    add_command(parent, cancel)


def submit_slurm(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    site: _SiteOption = None,
    dry_run: _DryRunOption = False,
    pipeline: _PipelineOption = False,
    stage: _StageOption = None,
    follow: _FollowOption = False,
) -> None:
    """Submit the training of a configuration to SLURM; with --pipeline, preparation and evaluation around it.

    What to ask for stands in the section 'cluster' of the configuration: nodes, gpus_per_node, partition, time and so
    on ('paralm config show' prints all). The scripts are those of slurm/, filled in; they are kept in RUN/jobs/ with
    the configuration as it is now. Near its time limit a job saves and queues itself again.
    """
    from paralm_launch.cluster import plan, submit

    settings, stages = _load(config, overrides, site, pipeline, stage)
    planned = plan.plan_slurm(settings, stages)
    if dry_run:
        _print_scripts(planned)
        return
    submit.refuse_second(planned)
    made = submit.to_slurm(planned)
    _say_submitted(made, settings.run_dir)
    if follow:
        _follow(made[-1], 0)


def submit_ray(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None, typer.Option(help="Of the cluster's Jobs API, http://HOST:8265; default: cluster.ray.")
    ] = None,
    site: _SiteOption = None,
    dry_run: _DryRunOption = False,
    pipeline: _PipelineOption = False,
    stage: _StageOption = None,
    follow: _FollowOption = False,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Follow, and submit again when the job was preempted or its cluster was lost."),
    ] = False,
    patience: Annotated[
        float, typer.Option(min=1, help="With --keep: seconds to wait for a cluster that does not answer.")
    ] = 3600.0,
) -> None:
    """Submit the training of a configuration to a Ray cluster, through its Jobs API.

    The cluster's nodes see this folder and run.root, as they see them here. A job that is stopped ('paralm cancel')
    saves first; the same command goes on from there.
    """
    from paralm_launch.cluster import plan, ray_jobs, submit

    settings, stages = _load(config, overrides, site, pipeline, stage)
    planned = plan.plan_ray(settings, stages)
    if dry_run:
        _print_scripts([planned])
        return
    where = ray_jobs.address_of(settings, address)
    submit.refuse_second([planned])
    if keep:
        submit.keep_on_ray(lambda: plan.plan_ray(settings, stages), settings, where, say, patience)
        return
    made = submit.to_ray(planned, settings, where)
    _say_submitted([made], settings.run_dir)
    if follow:
        _follow(made, 0)


def status(
    runs: _RunsArgument = None,
    root: _RootOption = _RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one object a job.")] = False,
) -> None:
    """Show the jobs of runs and how far these are; without a name, of all runs that have jobs."""
    from paralm_launch.cluster import records, watch

    jobs = records.of_runs(runs or [], root)
    if not jobs:
        say(f"no run in {root}/ has jobs; 'paralm submit slurm CONFIG' or 'paralm submit ray CONFIG' makes some")
        return
    found = watch.look(jobs)
    if as_json:
        rows = [{**asdict(job), "run": str(job.run), "states": [asdict(s) for s in states]} for job, states in found]
        typer.echo(json.dumps(rows, indent=1))
        return
    by_run: dict[Path, list[tuple[Job, list[Status]]]] = {}
    for job, states in found:
        by_run.setdefault(job.run, []).append((job, states))
    for run, entries in by_run.items():
        say(f"{run}: {_progress(run)}")
        table(None, ("job", "id", "state", "time", "limit", "nodes", ""), [_row(*entry) for entry in entries])


def logs(
    run: Annotated[str, typer.Argument(metavar="RUN|ID", help="A run's folder or name, or a job's id.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 100,
    root: _RootOption = _RUNS,
) -> None:
    """Print what a run's newest job has said; with -f, also what it says from now on, of every job up to the last.

    The files are RUN/jobs/*.log.
    """
    from paralm_launch.cluster import records, watch

    jobs = records.find(run, root)
    if not follow:
        begun = [job for job in jobs if any(path.exists() for path in job.logs())]
        watch.show((begun or jobs)[-1], say, lines)
        return
    active = [job for job, states in watch.look(jobs) if any(watch.is_active(job, s) for s in states)]
    for job in active or jobs[-1:]:
        _follow(job, lines)


def cancel(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|ID", help="As in status.")], root: _RootOption = _RUNS
) -> None:
    """Stop the jobs of runs, or jobs by id. Training saves first; submitted again, it goes on from there."""
    from paralm_launch.cluster import records, watch

    jobs = records.of_runs(runs, root)
    ended = watch.cancel(jobs)
    for job in ended:
        say(f"cancelled: {job.id} ({job.name} of {job.run})")
    if not ended:
        say("nothing to cancel: " + ", ".join(f"{job.id} is {states[0].state}" for job, states in watch.look(jobs)))


# -- what they share -------------------------------------------------------------------------------------------


def _load(
    config: str, overrides: Sequence[str] | None, site: Path | None, pipeline: bool, stage: Sequence[str] | None
) -> tuple[Config, list[str]]:
    """The configuration over the site's, checked as far as it can be before it runs, and the stages asked for."""
    from paralm.config_files import load_config
    from paralm_launch.cluster import plan

    stages = list(plan.STAGES) if pipeline else list(stage or ["train"])
    if pipeline and stage:
        raise RunError("--pipeline is every stage; leave --stage out, or give the stages by themselves")
    for name in stages:
        if name not in plan.STAGES:
            raise RunError(f"--stage {name}: there is {', '.join(plan.STAGES)}")
    lab = site or (Path(os.environ["PARALM_SITE"]) if os.environ.get("PARALM_SITE") else None)
    made = load_config([*([lab] if lab is not None else []), config], overrides or []).config
    plan.check(made, stages)
    return made, stages


def _print_scripts(planned: Sequence[Planned]) -> None:
    for plan in planned:
        if len(planned) > 1:
            after = ", ".join(planned[index].name for index in plan.after)
            say(f"# ==== {plan.file(plan.ending)}{f', after {after}' if after else ''}")
        typer.echo(plan.script, nl=False)


def _say_submitted(made: Sequence[Job], run: Path) -> None:
    for job in made:
        array = f", {job.tasks} tasks" if job.tasks > 1 else ""
        after = f", after {', '.join(job.after)}" if job.after else ""
        say(f"submitted: {job.name}, job {job.id}{array}{after}")
    quoted = shlex.quote(str(run))
    say(
        f"\n  paralm status {quoted}    where it is\n"
        f"  paralm logs {quoted} -f   what it says\n"
        f"  paralm cancel {quoted}    save and end"
    )


def _follow(job: Job, lines: int) -> None:
    """Until the job is over. Raises RunError when it did not end well."""
    from paralm_launch.cluster import watch

    found = watch.follow(job, say, lines)
    bad = [s for s in found if s.state not in ("COMPLETED", "SUCCEEDED")]
    if bad:
        why = f" ({bad[0].reason})" if bad[0].reason else ""
        raise RunError(f"job {job.id} ({job.name}) is {bad[0].state}{why}")
    say(f"job {job.id} ({job.name}): {found[0].state}")


def _row(job: Job, states: Sequence[Status]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for state in states:
        counts[state.state] = counts.get(state.state, 0) + 1
    shown = ", ".join(f"{n} {name}" if len(states) > 1 else name for name, n in counts.items())
    first = next((s for s in states if s.active), states[-1])
    requeued = sum(" requeue " in line for line in job.events())
    notes = [first.reason, f"requeued {requeued}×" if requeued else ""]
    notes += [f"after {', '.join(job.after)}"] if job.after and first.state == "PENDING" else []
    return job.name, job.id, shown, first.elapsed, first.limit, first.nodes, ", ".join(filter(None, notes))


def _progress(run: Path) -> str:
    """How far the run is, from its own folder."""
    from paralm.training import checkpoint
    from paralm.training.metrics import last_rows

    last = next((row for _, row in last_rows(run / "metrics.jsonl") if row["kind"] == "train"), None)
    if last is None:
        return "no step yet"
    saved = checkpoint.steps(run / "checkpoints")
    newest = f", newest checkpoint {saved[-1]:,}" if saved else ""
    return f"step {last['step']:,} of {last['max_steps']:,}, loss {last['loss']:.3f}{newest}"
