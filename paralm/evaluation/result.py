"""What an evaluation finds: typed, and written in one place as JSON, TensorBoard scalars and figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from paralm_data.atomic import write_file
from pydantic import BaseModel, ConfigDict, ValidationError

from paralm.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

M = TypeVar("M", bound=BaseModel)


class Result(BaseModel):
    """Base of all results. A subclass adds its fields and says what of them is a scalar and what a figure.

    JSON has no infinity: it is written as a string, and read back as the number.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())

    kind: ClassVar[str] = "result"

    step: int = 0  # of the checkpoint
    train_seq_len: int | None = None  # what the model was trained on at a time, in tokens

    @property
    def name(self) -> str:
        """Of its files, and of its scalars after ``eval/``."""
        return self.kind

    def scalars(self) -> dict[str, float]:
        """Single numbers worth following over steps, by name."""
        return {}

    def figures(self) -> dict[str, Figure]:
        """Figures by name."""
        return {}


def eval_dir(run_dir: Path) -> Path:
    """Where a run's results are."""
    return run_dir / "eval"


def save(results: Iterable[Result], run_dir: Path) -> list[Path]:
    """Write ``eval/NAME.json``, ``eval/NAME_FIGURE.png`` and the scalars ``eval/NAME/KEY``; returns the files."""
    from paralm.evaluation import figures

    folder, files = eval_dir(run_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    found = list(results)
    for result in found:
        files.append(folder / f"{result.name}.json")
        write_json(files[-1], result)
        for key, figure in result.figures().items():
            files.append(figures.save(figure, folder / f"{result.name}_{key}.png"))
    _write_scalars(found, run_dir)
    return files


def write_json(path: Path, content: BaseModel) -> None:
    """Replace ``path``, whole or not at all."""
    write_file(path, (content.model_dump_json(indent=1) + "\n").encode("utf-8"))


def read_json(kind: type[M], path: Path) -> M | None:
    """What :func:`write_json` wrote, or None if there is no such file. RunError, one line, if it is damaged."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise RunError(f"{path}: damaged ({' '.join(what.split())}); remove it and evaluate again") from None


def _write_scalars(found: list[Result], run_dir: Path) -> None:
    """A folder of its own below ``tensorboard/``: TensorBoard stops reading a folder's older event file once a
    newer one is beside it, so an evaluation beside the file of a live training would cut that off."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(run_dir / "tensorboard" / "eval"))
    try:
        for result in found:
            for key, value in result.scalars().items():
                board.add_scalar(f"eval/{result.name}/{key}", value, result.step)
    finally:
        board.close()
