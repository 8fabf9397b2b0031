"""Jobs of a configuration: their scripts, what is refused before anything is submitted, and what SLURM prints."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from paralm_launch import cli
from paralm_launch.cluster import plan, records, slurm
from paralm_launch.cluster.records import Job
from paralm_launch.cluster.slurm import Status

from paralm import resources
from paralm.config import Config
from paralm.config_cluster import seconds_of
from tests.conftest import settings

SITE: dict[str, Any] = {
    "cluster": {
        "partition": "gpu",
        "account": "lab7",
        "qos": "long",
        "constraint": "a100|h100",
        "memory": "200G",
        "time": "12:00:00",
        "sbatch": ["--exclusive", "--mail-type=END"],
        "setup": ["module load python", "source '/opt/my env/bin/activate'"],
    }
}
Paralm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def paralm(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Paralm:
    """``paralm(*arguments)``: (exit code, stdout, stderr) in a folder with run.yaml and site.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PARALM_SITE", raising=False)
    Path("run.yaml").write_text(yaml.safe_dump(settings(corpus, prepared, Path("runs"))))
    Path("site.yaml").write_text(yaml.safe_dump(SITE))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's programs as scripts: sbatch notes its arguments and the script, squeue prints a file of the folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    said = tmp_path / "said"
    invalid = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    programs = {
        "sbatch": f'echo "$*" >>{said}/sbatch; cat "${{@: -1}}" >{said}/script\n'
        f"cat {said}/refusal >&2 2>/dev/null && exit 1\n"
        f"echo $((100 + $(wc -l <{said}/sbatch)))",
        "squeue": f"cat {said}/squeue 2>/dev/null || {{ {invalid}; }}",
        "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
        "scancel": f'echo "$*" >>{said}/scancel',
    }
    said.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return said


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_what_is_submitted_is_what_the_dry_run_shows(paralm: Paralm, sbatch: Path, tmp_path: Path) -> None:
    code, shown, _ = paralm("submit", "slurm", "run.yaml", "--dry-run")
    assert code == 0
    assert not Path("runs").exists(), "a dry run writes nothing"
    code, out, err = paralm("submit", "slurm", "run.yaml")
    assert code == 0, err
    assert (sbatch / "script").read_text() == shown == Path("runs/tiny/jobs/000001-train.sbatch").read_text()
    assert "submitted: train, job 101" in out
    assert "paralm logs runs/tiny -f" in out
    (job,) = records.jobs_of(Path("runs/tiny"))
    assert (job.id, job.backend, job.name, job.folder) == ("101", "slurm", "train", str(tmp_path))
    assert subprocess.run(["bash", "-n"], input=shown, text=True, check=False).returncode == 0


def test_the_commands_it_names_can_be_pasted(paralm: Paralm, sbatch: Path) -> None:
    code, out, err = paralm("submit", "slurm", "run.yaml", "run.root=my runs")
    assert code == 0, err
    assert "\n  paralm cancel 'my runs/tiny'    save and end\n" in out
    (sbatch / "squeue").write_text("101|N/A|PENDING|0:00|10:00||Resources\n")
    assert "(paralm cancel 'my runs/tiny')" in paralm("submit", "slurm", "run.yaml", "run.root=my runs")[2]
    assert "see paralm status 'my runs/tiny'\n" in paralm("logs", "tiny", "--root", "my runs")[2]


def test_the_job_has_the_configuration_as_it_was(paralm: Paralm, sbatch: Path) -> None:
    """What is edited after the submission does not reach the job."""
    from paralm.config_files import load_config

    before = load_config("run.yaml", ["training.max_steps=9"]).config
    assert paralm("submit", "slurm", "run.yaml", "training.max_steps=9")[0] == 0
    Path("run.yaml").write_text("run: {name: other}\n")
    argument = next(
        line for line in (sbatch / "script").read_text().splitlines() if line.startswith("set -- /")
    ).removeprefix("set -- ")
    assert load_config(argument).config == before


def test_a_site_writes_its_settings_once_and_the_run_goes_over_them(
    paralm: Paralm, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["cluster.nodes=4", "cluster.gpus_per_node=8", "cluster.cpus_per_rank=6", "cluster.qos=short"]
    code, by_option, err = paralm("submit", "slurm", "run.yaml", "--site", "site.yaml", "--dry-run", *more)
    assert code == 0, err
    options = options_of(by_option)
    for wanted in (
        "--partition=gpu",
        "--account=lab7",
        "--qos=short",
        "--constraint=a100|h100",
        "--mem=200G",
        "--time=12:00:00",
        "--exclusive",
        "--mail-type=END",
        "--nodes=4",
        "--gpus-per-node=8",
        "--cpus-per-task=48",
        "--signal=B:USR1@300",
        "--requeue",
    ):
        assert wanted in options
    assert "\nmodule load python\nsource '/opt/my env/bin/activate'\nset -- " in by_option
    assert "\nranks_per_node=8\n" in by_option
    monkeypatch.setenv("PARALM_SITE", "site.yaml")
    assert paralm("submit", "slurm", "run.yaml", "--dry-run", *more)[1] == by_option
    assert (
        "--gres=gpu:a100:2"
        in paralm("submit", "slurm", "run.yaml", "--dry-run", "cluster.gres=gpu:a100:2", "cluster.ranks_per_node=2")[1]
    )


def test_folders_on_local_disks_are_the_jobs_own(paralm: Paralm) -> None:
    offload = ("parallel.zero_stage=3", "parallel.offload_optimizer=nvme", "parallel.nvme_path=/local/nvme")
    for start in ("torchrun", "ray"):
        shown = paralm("submit", "slurm", "run.yaml", "--dry-run", f"cluster.start={start}", "cluster.scratch=/s")[1]
        assert "\nscratch=/s\n" in shown
        assert "\nnvme= " in shown
        shown = paralm("submit", "slurm", "run.yaml", "--dry-run", f"cluster.start={start}", *offload)[1]
        assert "\nnvme=/local/nvme\n" in shown


def test_a_pipeline_is_prepare_train_evaluate_one_after_the_other(paralm: Paralm, sbatch: Path) -> None:
    given = [
        "cluster.evaluate.what=[report,'perplexity max_tokens=900']",
        "cluster.evaluate.tasks=4",
        "cluster.evaluate.at_once=2",
        "cluster.evaluate.time='30'",
        "cluster.prepare.partition=cpu",
        "cluster.prepare.tasks=3",
        "cluster.signal_seconds=60",
    ]
    code, out, err = paralm("submit", "slurm", "run.yaml", "--site", "site.yaml", "--pipeline", *given)
    assert code == 0, err
    jobs = {job.name: job for job in records.jobs_of(Path("runs/tiny"))}
    assert list(jobs) == ["prepare", "train", "evaluate-report", "evaluate-perplexity"]
    calls = (sbatch / "sbatch").read_text().splitlines()
    assert [" ".join(call.split()[1:-1]) for call in calls] == [
        "",
        "--dependency=afterok:101 --kill-on-invalid-dep=yes",
        "--dependency=afterok:102 --kill-on-invalid-dep=yes",
        "--dependency=afterok:102 --kill-on-invalid-dep=yes",
    ]
    assert "evaluate-perplexity, job 104, 4 tasks, after 102" in out
    assert "prepare, job 101, 3 tasks" in out
    prepare = jobs["prepare"].file(".sbatch").read_text()
    assert {"--partition=cpu", "--array=0-2", "--nodes=1", "--cpus-per-task=8"} <= set(options_of(prepare))
    assert f"--output={jobs['prepare'].file('-%a.log').absolute()}" in options_of(prepare)
    assert "\nexecutor=shared\n" in prepare
    array = options_of(jobs["evaluate-perplexity"].file(".sbatch").read_text())
    assert {"--array=0-3%2", "--time=30", "--partition=gpu"} <= set(array)
    assert f"--output={jobs['evaluate-perplexity'].file('-%a.log').absolute()}" in array
    assert not any("array" in line for line in options_of(jobs["evaluate-report"].file(".sbatch").read_text()))
    assert "perplexity" in jobs["evaluate-perplexity"].file(".sbatch").read_text()


def test_of_a_pipeline_that_is_refused_midway_nothing_is_left(paralm: Paralm, sbatch: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.write_text(
        program.read_text().replace(
            "#!/bin/bash\n", "#!/bin/bash\n[[ $* = *dependency* ]] && { echo no >&2; exit 1; }\n"
        )
    )
    code, _, err = paralm("submit", "slurm", "run.yaml", "--pipeline")
    assert (code, err) == (2, "error: SLURM: no\n")
    assert (sbatch / "scancel").read_text().split() == ["101"]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("nowhere.yaml",), "nowhere.yaml: no such file or preset"),
        (("run.yaml", "model.d_modle=3"), "model.d_modle: unknown key; nearest: model.d_model"),
        (("run.yaml", "cluster.partitoin=x"), "cluster.partitoin: unknown key; nearest: cluster.partition"),
        (("run.yaml", "cluster.time='soon'"), "'soon' is no time; give 24:00:00"),
        (("run.yaml", "cluster.time='5'"), "time '5' leaves nothing before signal_seconds 300"),
        (("run.yaml", "cluster.gres=gpu:2"), "gres 'gpu:2' needs ranks_per_node"),
        (("run.yaml", "cluster.sbatch=[exclusive]"), "'exclusive' is no option of sbatch"),
        (("run.yaml", "data.dir=nowhere"), "nowhere"),
        (("run.yaml", "--stage", "score"), "--stage score: there is prepare, train, evaluate"),
        (("run.yaml", "--pipeline", "--stage", "train"), "leave --stage out"),
        (("run.yaml", "--stage", "evaluate"), "runs/tiny: no run to evaluate"),
        (("run.yaml", "--pipeline", "cluster.evaluate.what=[perplxity]"), "perplxity"),
        (("run.yaml", "--pipeline", "cluster.evaluate.what=['perplexity max_toknes=3']"), "max_toknes"),
        (("run.yaml", "parallel.time=2"), "parallel.time: 2 time shards do not divide 1 ranks"),
        (("run.yaml", "parallel.time=2", "cluster.nodes=9"), "parallel.time: 2 time shards do not divide 9 ranks"),
        (("run.yaml", "--pipeline", "cluster.evaluate.what=['report eval.bogus=3']"), "eval.bogus: unknown key"),
        (("run.yaml", "--pipeline", "cluster.evaluate.what=['report eval.max_tokens=few']"), "eval.max_tokens: "),
        (("run.yaml", "--pipeline", "cluster.evaluate.what=['report run.seed=3']"), "takes settings of eval.*"),
        (
            ("tracking/parity_paragru", "--pipeline", "cluster.evaluate.what=['report eval.max_tokens=3']"),
            "evaluation 'tracking' has no such setting",
        ),
        (("run.yaml", "--pipeline", "cluster.prepare={tasks: 2, nodes: 2}"), "nodes 2 are MPI ranks of one job, and"),
        (("run.yaml", "--site", "none.yaml"), "none.yaml: no such file"),
        (("tracking/parity_paragru", "--stage", "prepare"), "there is nothing to prepare"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(
    paralm: Paralm, sbatch: Path, given: tuple[str, ...], words: str
) -> None:
    code, _, err = paralm("submit", "slurm", *given)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1, "one line"
    assert not (sbatch / "sbatch").exists()
    assert not Path("runs").exists()


def test_without_slurm_or_refused_by_it_is_one_line(
    paralm: Paralm, sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sbatch / "refusal").write_text(
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    code, _, err = paralm("submit", "slurm", "run.yaml", "cluster.partition=nope")
    assert code == 2
    assert err == (
        "error: SLURM: invalid partition specified: nope; Batch job submission failed: Invalid partition name "
        "specified (cluster.partition)\n"
    )
    assert not Path("runs").exists(), "a submission that was refused leaves nothing"
    Path("runs").mkdir()
    assert paralm("submit", "slurm", "run.yaml", "cluster.partition=nope")[0] == 2
    assert not list(Path("runs").iterdir()), "but the folders that were there"
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = paralm("submit", "slurm", "run.yaml")
    assert (code, err) == (
        2,
        "error: sbatch: not found; this needs SLURM's commands on the PATH, as on a login node\n",
    )


def test_a_job_submitted_from_within_a_job_gets_nothing_of_it(
    paralm: Paralm, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another's SLURM_ARRAY_TASK_ID it would evaluate a part, and queue that one's array again."""
    inside = {"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3", "CPU_BIND": "mask_cpu:0x1", "CONF": "/etc/s"}
    for name, value in inside.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    path = sbatch.parent / "bin" / "sbatch"
    path.write_text(path.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\nenv >{sbatch}/env\n"))
    assert paralm("submit", "slurm", "run.yaml")[0] == 0
    seen = [line for line in (sbatch / "env").read_text().splitlines() if line.startswith("SLURM_")]
    assert seen == ["SLURM_CONF=/etc/s"]


@pytest.mark.parametrize(
    ("known", "job", "more"),
    [("7\n7", "7_3", " --part array"), ("12", "12", ""), ("", "7_3", " --part array")],
    ids=["a task", "submitted within a task", "SLURM does not answer"],
)
def test_a_script_submitted_by_hand_within_an_array_is_no_task_of_it(
    sbatch: Path, tmp_path: Path, known: str, job: str, more: str
) -> None:
    """sbatch leaves it the variables of the task within which it is called."""
    (sbatch / "squeue").write_text(known)
    (sbatch.parent / "bin" / "paralm").write_text(f'#!/bin/bash\necho "$@" >{sbatch}/paralm\n')
    (sbatch.parent / "bin" / "paralm").chmod(0o755)
    given = {"JOB_ID": "12", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3", "ARRAY_TASK_COUNT": "8", "JOB_NODELIST": "n1"}
    script = resources.find("slurm/eval.sbatch").read_text().replace("events=/dev/null", f"events={tmp_path}/events")
    environment = {**os.environ, **{f"SLURM_{name}": value for name, value in given.items()}}
    subprocess.run(["bash", "-s", "capacity", "runs/x"], input=script, text=True, env=environment, check=True)
    assert (sbatch / "paralm").read_text() == f"eval capacity runs/x{more}\n"
    assert {line.split()[1] for line in (tmp_path / "events").read_text().splitlines()} == {f"job={job}"}


def test_a_run_with_a_job_under_way_is_not_submitted_again(paralm: Paralm, sbatch: Path) -> None:
    assert paralm("submit", "slurm", "run.yaml")[0] == 0
    (sbatch / "squeue").write_text("101|N/A|PENDING|0:00|10:00||Resources\n")
    code, _, err = paralm("submit", "slurm", "run.yaml")
    assert code == 2
    assert "runs/tiny: job 101 (train) is PENDING; cancel it" in err
    Path("runs/tiny/config.yaml").write_text("{}")
    code, out, err = paralm("submit", "slurm", "run.yaml", "--stage", "evaluate")
    assert "submitted: evaluate-report, job 102" in out, "beside the training, checkpoints can be evaluated"
    (sbatch / "squeue").write_text("101|N/A|FAILED|0:10|10:00|n1|NonZeroExitCode\n")
    assert paralm("submit", "slurm", "run.yaml")[0] == 0
    assert [job.number for job in records.jobs_of(Path("runs/tiny"))] == [1, 2, 3]


def test_status_and_cancel_by_run_and_by_id(paralm: Paralm, sbatch: Path) -> None:
    assert paralm("submit", "slurm", "run.yaml")[0] == 0
    (sbatch / "squeue").write_text("101|N/A|RUNNING|1:05|10:00|node[1-2]|None\n")
    for name in ("runs/tiny", "tiny", "101"):
        code, out, _ = paralm("status", name)
        assert code == 0
        assert "runs/tiny: no step yet" in out
        assert out.splitlines()[-1].split() == ["train", "101", "RUNNING", "1:05", "10:00", "node[1-2]"]
    assert paralm("status")[1] == out, "without a name: all"
    assert paralm("cancel", "tiny")[1] == "cancelled: 101 (train of runs/tiny)\n"
    assert (sbatch / "scancel").read_text() == "101\n"
    code, _, err = paralm("status", "999")
    assert code == 2
    assert "999: no run, and no job of the runs in runs/ has that id" in err
    (sbatch / "squeue").unlink()
    Path("runs/tiny/jobs/000001-train.events").write_text(
        "t job=101 restarts=0 requeue code=75\nt job=101 end code=0\n"
    )
    out = paralm("status", "tiny")[1]
    assert "COMPLETED" in out, "when SLURM has forgotten a job, its own notes tell"
    assert "requeued 1×" in out
    assert "nothing to cancel: 101 is COMPLETED" in paralm("cancel", "tiny")[1]


@pytest.mark.parametrize("refuses", ["none", "unknown", "every"])
def test_squeue_is_asked_once_for_all_jobs(sbatch: Path, refuses: str) -> None:
    """A version that refuses a list for one id, or for many, is asked one by one."""
    rows = "".join(f"{job}|N/A|RUNNING|0:01|10:00|n1|None\n" for job in (1, 3))
    (sbatch / "squeue").write_text(rows)
    refused = {"none": "*none*", "unknown": "*2*|4", "every": "*"}[refuses]
    invalid = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    (sbatch.parent / "bin" / "squeue").write_text(
        f'#!/bin/bash\necho "$6" >>{sbatch}/asked\ncase "$6" in {refused}) {invalid};; esac\n'
        f'grep -E "^(${{6//,/|}})\\|" {sbatch}/squeue; true\n'
    )
    found = slurm.statuses(["1", "2", "3"])
    assert found == ({} if refuses == "every" else {job: [Status("RUNNING", "0:01", "10:00", "n1")] for job in "13"})
    asked = (sbatch / "asked").read_text().split()
    assert asked == ["1,2,3", *([] if refuses == "none" else ["1", "2", "3"])]
    assert not slurm.statuses(["4"])


def test_logs_are_the_last_lines_and_of_an_array_say_whose(paralm: Paralm, sbatch: Path) -> None:
    assert paralm("submit", "slurm", "run.yaml")[0] == 0
    code, _, err = paralm("logs", "tiny")
    assert code == 2
    assert "has said nothing yet" in err
    (job,) = records.jobs_of(Path("runs/tiny"))
    job.file(".log").write_text("one\ntwo\nthree\n")
    assert paralm("logs", "101", "-n", "2")[1] == "two\nthree\n"
    array = Job(job.run, 2, "evaluate-x", "slurm", "7", 12, (), job.folder, job.submitted)
    records.write(array)
    for task in (0, 2, 10):
        array.file(f"-{task}.log").write_text(f"of {task}\n")
    assert paralm("logs", "tiny")[1] == "0: of 0\n2: of 2\n10: of 10\n"


def test_what_squeue_and_sacct_print() -> None:
    assert slurm.parse_squeue("12|N/A|RUNNING|1:05|1-00:00:00|n[1-2]|None\n9|3|PENDING|0:00|10:00||(Dep|x)\n") == {
        "12": [Status("RUNNING", "1:05", "1-00:00:00", "n[1-2]")],
        "9": [Status("PENDING", "0:00", "10:00", "", "(Dep|x)", 3)],
    }
    printed = (
        "12|COMPLETED|00:10:00|01:00:00|n1|0:0\n"
        "13|CANCELLED by 0|00:00:00|01:00:00|None assigned|0:0\n"
        "14_2|FAILED|00:00:09|01:00:00|n2|75:0\n"
        "14_[3-9]|PENDING|00:00:00|01:00:00|None assigned|0:0\n"
    )
    assert slurm.parse_sacct(printed) == {
        "12": [Status("COMPLETED", "00:10:00", "01:00:00", "n1")],
        "13": [Status("CANCELLED", "00:00:00", "01:00:00", "")],
        "14": [
            Status("FAILED", "00:00:09", "01:00:00", "n2", "exit code 75", 2),
            Status("PENDING", "00:00:00", "01:00:00", ""),
        ],
    }
    assert not Status("CANCELLED").active
    assert Status("COMPLETING").active


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_times_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(("gpus", "own", "asked"), [(0, None, None), (8, None, "1"), (8, 0.5, None)])
def test_a_ray_job_waits_for_gpus_that_are_not_there_yet(
    tmp_path: Path, gpus: int, own: float | None, asked: str | None
) -> None:
    """By itself a rank takes a GPU where the cluster has one; before its nodes of GPUs came, that would be a CPU."""
    made = {"cluster": {"gpus_per_node": gpus}, "launcher": {"gpus_per_rank": own}}
    script = plan.plan_ray(Config.model_validate({"run": {"root": tmp_path}, **made}), ["train"]).script
    given = dict(word.split("=", 1) for word in script.split() if word.startswith("launcher."))
    assert given.get("launcher.gpus_per_rank") == asked


@pytest.mark.parametrize("script", ["train", "ray in SLURM", "prepare", "evaluate", "ray"])
def test_lines_of_setup_may_use_variables_that_are_not_set(tmp_path: Path, script: str) -> None:
    """As the scripts of modules and of conda's packages do."""
    made = {"cluster": {"start": "ray" if script == "ray in SLURM" else "torchrun", "setup": [": $NOT_SET", "exit 7"]}}
    config = Config.model_validate({"run": {"root": tmp_path}, **made})
    stage = script if script in plan.STAGES else "train"
    planned = plan.plan_ray(config, [stage]) if script == "ray" else plan.plan_slurm(config, [stage])[0]
    done = subprocess.run(["bash"], input=planned.script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("template", ["train", "train_ray"])
@pytest.mark.parametrize(
    ("code", "saves", "again"), [(137, True, True), (4, True, True), (137, False, False), (4, False, False)]
)
def test_a_job_that_lost_ranks_is_queued_again_if_it_has_saved(
    sbatch: Path, tmp_path: Path, template: str, code: int, saves: bool, again: bool
) -> None:
    """Killed for its memory at its first step, say, it would be killed there again and again."""
    latest = tmp_path / "runs/run/checkpoints/latest"
    for folder in (latest.parent, tmp_path / "runs/run/jobs"):
        folder.mkdir(parents=True)
    latest.write_text("step_00000100\n")
    programs = {
        "srun": 'while [ "$1" != bash ]; do shift; done; "$@"',
        "paralm": f"{f'echo step_00000200 >{latest}' if saves else ''}\nexit {code}",
        "scontrol": f'echo "$*" >{sbatch}/scontrol',
        "ray": "exit 0",
    }
    for name, text in programs.items():
        (sbatch.parent / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (sbatch.parent / "bin" / name).chmod(0o755)
    made = {"cluster": {"start": "ray" if template == "train_ray" else "torchrun", "setup": [":"]}}
    script = plan.plan_slurm(Config.model_validate({"run": {"root": tmp_path / "runs"}, **made}), ["train"])[0].script
    given = {"JOB_ID": "7", "NNODES": "1", "JOB_NODELIST": "node1", "NODEID": "0", "PROCID": "0", "CPUS_PER_TASK": "1"}
    done = subprocess.run(
        ["bash"],
        input=script,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path), **{f"SLURM_{name}": value for name, value in given.items()}},
        check=False,
        timeout=60,
    )
    assert done.returncode == (75 if again else code)
    assert (sbatch / "scontrol").exists() == again
    (events,) = (tmp_path / "runs/run/jobs").glob("*.events")
    kinds = [" ".join(line.split()[3:]) for line in events.read_text().splitlines()]
    assert kinds[1:] == ([f"lost code={code}", "requeue code=75"] if again else [f"end code={code}"])


@pytest.mark.parametrize(
    ("agents", "code"), [((75, 137), 75), ((139, 75), 75), ((75, 75), 75), ((4, 137), 137), ((4, 2), 4), ((0, 0), 0)]
)
def test_a_job_that_saved_is_queued_again_although_an_agent_was_killed_while_it_left(
    sbatch: Path, tmp_path: Path, agents: tuple[int, int], code: int
) -> None:
    programs = {
        "srun": 'while [ "$1" != bash ]; do shift; done; most=0\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@"; code=$?; [ $code -le $most ] || most=$code; done; exit $most',
        "paralm": f'agents=({agents[0]} {agents[1]}); exit "${{agents[$SLURM_NODEID]}}"',
        "scontrol": f'echo "$*" >{sbatch}/scontrol',
    }
    for name, text in programs.items():
        (sbatch.parent / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (sbatch.parent / "bin" / name).chmod(0o755)
    given = {"JOB_ID": "7", "NNODES": "2", "JOB_NODELIST": "node[1-2]", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", resources.find("slurm/train.sbatch"), "x.yaml"],
        env={**os.environ, **{f"SLURM_{name}": value for name, value in given.items()}},
        check=False,
        timeout=60,
    )
    assert done.returncode == code
    assert (sbatch / "scontrol").exists() == (code == 75)


@pytest.mark.parametrize(("nodes", "address"), [(1, "127.0.1.1"), (2, "0.0.0.0")])
def test_ray_is_told_an_address_that_other_nodes_reach(sbatch: Path, tmp_path: Path, nodes: int, address: str) -> None:
    """Debian's installer writes a machine's name into /etc/hosts as 127.0.1.1. 0.0.0.0 stands for an outer address."""
    programs = {
        "getent": "echo '127.0.1.1       STREAM node1'",
        "hostname": '[ "$*" = -I ] && echo "fd00::2 0.0.0.0 172.17.0.1 " || echo node1',
        "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_PROCID=0 exec "$@"',
        "ray": f'echo "$@" >{sbatch}/ray',
        "sleep": "exec /bin/sleep 0.01",
        "paralm": f'echo "$@" >{sbatch}/paralm',
    }
    for name, text in programs.items():
        (sbatch.parent / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (sbatch.parent / "bin" / name).chmod(0o755)
    given = {"JOB_ID": "7", "NODEID": "0", "NNODES": str(nodes), "JOB_NODELIST": "node[1-2]", "TMPDIR": str(tmp_path)}
    subprocess.run(
        ["bash", resources.find("slurm/train_ray.sbatch"), "x.yaml"],
        env={**os.environ, **{f"SLURM_{name}": value for name, value in given.items()}},
        check=True,
        timeout=60,
    )
    assert f" launcher.address={address}:" in (sbatch / "paralm").read_text()
    assert f" --node-ip-address={address} " in (sbatch / "ray").read_text()


def test_a_ray_job_is_one_script(paralm: Paralm) -> None:
    code, shown, err = paralm("submit", "ray", "run.yaml", "--dry-run", "--pipeline", "cluster.nodes=2")
    assert code == 0, err
    work = [line for line in shown.splitlines() if line.startswith("paralm ")]
    assert [line.split()[1] for line in work] == ["data", "train", "eval"]
    assert 'launcher.kind=ray launcher.address="$RAY_ADDRESS" launcher.ranks=2' in work[1]
    assert not Path("runs").exists()
    assert paralm("submit", "ray", "run.yaml")[2].startswith("error: which Ray cluster?")
    assert "such as http://HOST:8265" in paralm("submit", "ray", "run.yaml", "--address", "127.0.0.1:6379")[2]
    code, _, err = paralm("submit", "ray", "run.yaml", "--address", "http://127.0.0.1:9")
    assert (code, err.count("\n")) == (2, 1)
    assert "http://127.0.0.1:9: no Ray cluster answers there" in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("ends", "jobs", "words"),
    [
        ([Status("SUCCEEDED")], 1, ""),
        ([Status("FAILED", reason="exit code 75"), None, Status("SUCCEEDED")], 3, ""),
        ([Status("FAILED", reason="exit code 2")], 1, "is FAILED, exit code 2; see paralm logs 'my runs/tiny'\n"),
        ([Status("STOPPED")], 1, "was stopped; the same command continues"),
        ([None] * 9, 3, "its cluster is gone; 3 jobs have saved nothing new; see paralm logs 'my runs/tiny'\n"),
    ],
)
def test_a_job_that_is_kept_is_submitted_again_where_that_can_help(
    paralm: Paralm, monkeypatch: pytest.MonkeyPatch, ends: list[Status | None], jobs: int, words: str
) -> None:
    """Preempted or with its cluster lost: again, while that saves something. Ended for good: not."""
    from paralm_launch.cluster import ray_jobs

    submitted: list[str] = []

    def submit(address: str, job: str, entrypoint: str, grace: float, run: str) -> str:
        submitted.append(job)
        record = f"my runs/tiny/jobs/{len(submitted):06d}-train"
        end = ends[len(submitted) - 1]
        if end is not None:
            code = end.reason.rpartition(" ")[2] or "0"
            Path(f"{record}.events").write_text(f"t start\nt end code={code}\n")
            Path(f"{record}.log").write_text(f"said by {len(submitted)}\n")
        return job

    monkeypatch.setattr(ray_jobs, "submit", submit)
    monkeypatch.setattr(ray_jobs, "status", lambda address, job: ends[submitted.index(job)])
    given = ("--address", "http://127.0.0.1:9", "--keep", "launcher.max_failures=1", "run.root=my runs")
    code, out, err = paralm("submit", "ray", "run.yaml", *given)
    assert (code, len(submitted)) == (2 if words else 0, jobs)
    assert words in err
    assert len(set(submitted)) == jobs
    assert ("said by 1" in out) == (ends[0] is not None)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_job_whose_answer_was_lost_is_not_submitted_twice(
    paralm: Paralm, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    from paralm_launch.cluster import ray_jobs, submit

    sent: list[str] = []
    there: set[str] = set()
    asked: list[int] = []

    class Client:
        def submit_job(self, entrypoint: str, submission_id: str, **more: Any) -> str:
            assert Path(entrypoint.split()[-1]).is_file()
            sent.append(submission_id)
            if len(sent) > 1 or arrived:
                there.add(submission_id)
            if len(sent) == 1:
                raise ConnectionError("the answer is lost")
            return submission_id

    def status(address: str, job: str) -> Status | None:
        asked.append(len(sent))
        if len(asked) == 1:
            raise ray_jobs.Unreachable("not yet")
        return Status("SUCCEEDED") if job in there else None

    monkeypatch.setattr(ray_jobs, "client", lambda address: Client())
    monkeypatch.setattr(ray_jobs, "status", status)
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    code, out, err = paralm("submit", "ray", "run.yaml", "--address", "http://127.0.0.1:9", "--keep")
    assert (code, err) == (0, "")
    assert "may have arrived; trying again" in out
    assert sent == [sent[0]] * (1 if arrived else 2), "another try has the same name"
    (job,) = records.jobs_of(Path("runs/tiny"))
    assert job.id == sent[0]
    assert job.file(".sh").is_file()


def test_a_job_that_may_be_there_is_on_record(paralm: Paralm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --keep the command ends; what may run has its script, and 'paralm cancel' reaches it."""
    from paralm_launch.cluster import ray_jobs

    class Client:
        def submit_job(self, **more: Any) -> str:
            raise ConnectionError("the answer is lost")

    monkeypatch.setattr(ray_jobs, "client", lambda address: Client())
    code, _, err = paralm("submit", "ray", "run.yaml", "--address", "http://127.0.0.1:9")
    (job,) = records.jobs_of(Path("runs/tiny"))
    assert code == 2
    assert f"job {job.id} may have arrived" in err
    assert err.count("\n") == 1
    assert job.file(".sh").is_file()
    monkeypatch.setattr(ray_jobs, "status", lambda address, name: Status("RUNNING"))
    assert "is RUNNING; cancel it" in paralm("submit", "ray", "run.yaml", "--address", "http://127.0.0.1:9")[2]


def test_a_ray_job_that_cannot_be_recorded_is_not_left_running(paralm: Paralm, monkeypatch: pytest.MonkeyPatch) -> None:
    from paralm_launch.cluster import ray_jobs

    running: set[str] = set()

    def submit(address: str, job: str, *more: Any) -> str:
        running.add(job)
        return job

    def write(job: Job) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_jobs, "submit", submit)
    monkeypatch.setattr(ray_jobs, "stop", lambda address, job: running.discard(job))
    monkeypatch.setattr(records, "write", write)
    assert paralm("submit", "ray", "run.yaml", "--address", "http://127.0.0.1:9")[0] != 0
    assert not running
    assert not Path("runs").exists()
