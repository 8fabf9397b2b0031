"""What is shipped: a wheel with all four packages, the presets and the templates, that runs without the source."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import paralm
from paralm import resources

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("paralm", "paralm_kernels", "paralm_data", "paralm_launch")


def sh(*command: object, cwd: Path) -> str:
    """Run a command that must succeed, with nothing of this process's import path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the hatchling of this environment, so that nothing is fetched."""
    out = tmp_path_factory.mktemp("wheel")
    sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_tracked_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    places = {
        "paralm": ROOT / "paralm",
        "paralm_kernels": ROOT / "kernels/paralm_kernels",
        "paralm_data": ROOT / "data_pipeline/paralm_data",
        "paralm_launch": ROOT / "launch/paralm_launch",
        "paralm/_share/configs": ROOT / "configs",
        "paralm/_share/slurm": ROOT / "slurm",
    }
    expected = {
        f"{target}/{path.relative_to(source)}"
        for target, source in places.items()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert any(name.endswith("licenses/LICENSE") for name in info)


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment that sees this one's dependencies, but not the source tree."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=False)
    inside = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    site, scripts = Path(inside["purelib"]), Path(inside["scripts"])
    dependencies = Path(sysconfig.get_paths()["purelib"])
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python")
    sh(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # A plain path entry: .pth files of that folder, the editable install's among them, are not read.
    (site / "dependencies.pth").write_text(f"{dependencies}\n")

    assert sh(scripts / "paralm", "--version", cwd=tmp_path) == f"paralm {paralm.__version__}\n"
    shown = sh(scripts / "paralm", "config", "show", "quickstart", cwd=tmp_path)
    assert "quickstart.yaml:" in shown
    assert "_share" in shown
    code = (
        "import importlib\n"
        f"for name in {PACKAGES!r}:\n"
        f"    assert importlib.import_module(name).__file__.startswith({str(site)!r}), name\n"
        "from paralm import resources\n"
        "print(*sorted(resources.presets()))\n"
        "resources.find('slurm/train.sbatch')\n"
    )
    assert sh(scripts / "python", "-c", code, cwd=tmp_path).split() == sorted(resources.presets())


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", paralm.__version__)


def test_the_extras_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"dev", "peers", "eval", "serve", "ray", "ray-serve", "mpi", "corpus"}
    assert set(project["optional-dependencies"]) == extras
    assert all(project["optional-dependencies"].values())


def test_imports_run_down_only() -> None:
    """Floor 1 knows nothing of paralm, and paralm nothing of its command line."""
    above = {
        "kernels": PACKAGES[0::3] + PACKAGES[2:3],
        "data_pipeline": PACKAGES[0:2] + PACKAGES[3:],
        "paralm": PACKAGES[3:],
    }
    for folder, forbidden in above.items():
        pattern = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(forbidden)})\b", re.MULTILINE)
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_the_licence_is_the_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_batch_scripts_are_valid_bash_and_answer_signals_alike() -> None:
    scripts = sorted((resources.share_root() / "slurm").glob("*.sbatch"))
    assert [script.stem for script in scripts] == ["eval", "prepare", "train", "train_ray"]
    shared = set()
    for script in scripts:
        assert sh("bash", "-n", script, cwd=ROOT) == ""
        shared.add(script.read_text().partition("# -- signals")[2].partition("# -- end of signals")[0])
    assert len(shared) == 1


def test_gpu_check_runs_everything_whatever_fails(tmp_path: Path) -> None:
    """Against a Python that only says what it is asked to run, and fails at tests and at one benchmark."""
    python = tmp_path / "python"
    text = f'#!/bin/sh\ncase "$*" in tools/*) exec {sys.executable} "$@" --python "$0";; esac\n'
    python.write_text(text + 'echo "ran $*"\ncase "$*" in *pytest*|*gpu_mixers*) exit 1;; esac\n')
    python.chmod(0o755)
    for name in ("base", "dev", "peers"):
        (tmp_path / name).touch()
    marks = [f"{name.upper()}={tmp_path / name}" for name in ("base", "dev", "peers")]
    command = ["make", "gpu-check", f"BIN={tmp_path}", *marks, "JOBS=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    ran = re.findall(r"^ran (.*)$", done.stdout, re.MULTILINE)[1:]
    tests = "-m pytest -q -n 3 --dist worksteal -m gpu tests/kernels -k"
    assert (ran[0], ran[-1]) == (f"{tests} not large_heads", f"{tests} large_heads")
    assert ran[1:-1] == [f"benchmarks/gpu_{name}.py" for name in ("solver", "mixers", "plan")]
    assert {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("gpu_*.py")} == set(ran[1:-1])
    ends = re.findall(r"^(\w+) +(passed|failed)", done.stdout, re.MULTILINE)
    passed = {"solver", "plan"}
    assert ends == [(n, "passed" if n in passed else "failed") for n in ("tests", "solver", "mixers", "plan", "waits")]


def test_in_limited_minutes_a_part_that_hangs_leaves_time_for_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu_check

    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    said = gpu_check.Part(("-c", "import sys; print('given', sys.argv[1:], flush=True)"), 1.0, ("--less",))
    parts = {"hangs": gpu_check.Part(("-c", hang), 1.0, timed=False), "goes on": said}
    lines = gpu_check.run(parts, sys.executable, 4 / 60, dict(os.environ))
    assert [line.split(" (")[0].split()[-1] for line in lines] == ["over", "passed"]
    given = re.search(r"given \['--less', '--minutes=0\.0(\d)'\]", capfd.readouterr().out)
    assert given is not None
    for wrong, text in (("--parts=tset", "no part 'tset'"), ("--minutes=0", "is no time")):
        assert gpu_check.main([wrong]) == 2
        assert text in capfd.readouterr().err
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    assert gpu_check.main(["--wheels", "/nowhere"]) == 2
    assert "no wheels in /nowhere: `make gpu-wheels`" in capfd.readouterr().err
