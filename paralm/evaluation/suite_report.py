"""``eval/report.md``: a page for each evaluation whose results lie in ``eval/``, written anew from their files."""

from __future__ import annotations

from pathlib import Path

from paralm_data.atomic import write_file

from paralm.errors import RunError
from paralm.evaluation import markdown as md
from paralm.evaluation.cells import StepRecord, SuiteRecord, load_record, load_steps
from paralm.evaluation.result import Result, eval_dir
from paralm.evaluation.suite import Evaluation, evaluations, read_result


def report_path(run_dir: Path) -> Path:
    """Where it is."""
    return eval_dir(run_dir) / "report.md"


def write_suite_report(run_dir: str | Path) -> Path:
    """Write ``eval/report.md`` of a run's (or export's) folder; returns its path.

    Whatever subset of evaluations was made is shown; a damaged file is named in its place and hides nothing else.
    """
    folder = eval_dir(Path(run_dir))
    parts = ["# Evaluations"]
    pages = {name: _page(kind, folder) for name, kind in evaluations().items()}
    found = {name: page for name, page in pages.items() if page is not None}
    if not found:
        parts.append("None yet: `paralm eval --list` names them.")
    for name, page in found.items():
        parts += [f"## {name}", page]
    folder.mkdir(parents=True, exist_ok=True)
    write_file(report_path(Path(run_dir)), ("\n\n".join(parts) + "\n").encode("utf-8"))
    return report_path(Path(run_dir))


def result_files(evaluation: type[Evaluation], folder: Path) -> list[Path]:
    """Files of an evaluation's results: those its record names, or ``NAME.json``."""
    record = load_record(folder / f"{evaluation.name}.cells")
    names = [name for name in record.files if name.endswith(".json")] if record else [f"{evaluation.name}.json"]
    return [folder / name for name in names if (folder / name).is_file()]


def _page(evaluation: type[Evaluation], folder: Path) -> str | None:
    files = result_files(evaluation, folder)
    if not files:
        return None
    found: list[Result] = []
    parts = []
    for path in files:
        try:
            result = read_result(evaluation, path)
        except RunError as error:
            parts.append(f"{md.code(path.name)} cannot be read: {md.code(str(error))}")
            continue
        if result is not None:
            found.append(result)
    if found:
        parts = [f"{evaluation.description()}.", evaluation.page(found), *parts]
        parts.append(_circumstances(found, load_record(folder / f"{evaluation.name}.cells")))
        parts += _over_steps(load_steps(folder.parent, evaluation.name))
    return "\n\n".join(parts)


def _circumstances(found: list[Result], record: SuiteRecord | None) -> str:
    """Of which checkpoint, where, and how long it took."""
    steps = sorted({result.step for result in found})
    text = f"Measured after step {', '.join(f'{step:,}' for step in steps)}"
    if record is not None and [record.basis.get("step")] == steps:
        text += f", in {record.dtype} on {record.device}, {md.duration(record.seconds)}"
        text += f" in {record.cells} pieces" if record.cells > 1 else ""
    return f"{text}."


def _over_steps(steps: dict[int, StepRecord]) -> list[str]:
    """The numbers of several checkpoints measured in the same way, newest last; at most the last 20."""
    if not steps:
        return []
    kinds = [tuple(record.basis.get(key) for key in ("settings", "version", "scoring")) for record in steps.values()]
    same = {step: record for (step, record), kind in zip(steps.items(), kinds) if kind == kinds[-1]}
    if len(same) < 2:
        return []
    shown = dict(list(same.items())[-20:])
    keys = list(next(reversed(shown.values())).scalars)
    rows = [
        [f"{step:,}", *(f"{record.scalars[key]:.6g}" if key in record.scalars else "" for key in keys)]
        for step, record in shown.items()
    ]
    return ["### Over training", md.table(["step", *keys], rows, right=range(len(keys) + 1))]
