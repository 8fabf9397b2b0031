"""Passkey retrieval and the needle family over a grid of lengths and depths (``paralm eval passkey RUN``).

Each cell of the grid is asked ``samples`` keys. An answer is right *teacher-forced* if every token of the key is the
likeliest one, the key's tokens before it given; it is right *generated* if greedy decoding writes the key. With no
extra tokens the two are the same by definition, and computed by different paths (a chunk, and steps): where they
differ, rounding decides between two tokens, or a decode path is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from paralm_data import DataError, TokenStore
from paralm_data.passkey import LENGTH_STEP, is_evaluation_length
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from paralm.errors import UserError
from paralm.evaluation import passkey_result
from paralm.evaluation.cells import file_digest
from paralm.evaluation.needles import TASKS, Builder, Task, chosen
from paralm.evaluation.passkey_result import PasskeyResult, Saving, by_distance, by_length, grid_cell, longest_passed
from paralm.evaluation.result import Result
from paralm.evaluation.retrieval import Asked, Reader
from paralm.evaluation.suite import Evaluation, EvaluationSettings, Target, register_evaluation

TaskName = Literal["passkey", "niah_noise", "niah_prose", "niah_uuid", "niah_multikey", "niah_multiquery"]
Depth = Annotated[float, Field(ge=0, le=1)]
_MULTIPLES = (0.5, 1.0, 2.0, 4.0, 8.0)


class PasskeySettings(EvaluationSettings):
    """Settings of ``paralm eval passkey``."""

    task: tuple[TaskName, ...] = Field(default=("passkey",), min_length=1, description="one, or several as [a, b]")
    lengths: tuple[PositiveInt, ...] | None = Field(
        default=None,
        min_length=1,
        description="prompt tokens, multiples of 8; default: 1/2, 1, 2, 4 and 8 times the training length",
    )
    depths: tuple[Depth, ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="of the first needle, fractions of the filler"
    )
    samples: PositiveInt = Field(default=20, description="keys a cell; 20 of 20 right is an accuracy above 84 %")
    seed: int = 0
    digits: Annotated[int, Field(ge=1, le=18)] | None = Field(default=None, description="of a key; default: 5; niah: 7")
    value: Literal["digits", "uuid"] | None = Field(default=None, description="default: the task's")
    haystack: Literal["noise", "prose", "needles"] | None = Field(default=None, description="default: the task's")
    distractors: NonNegativeInt | None = Field(default=None, description="further needles; default: the task's")
    queries: PositiveInt | None = Field(default=None, description="needles that are asked for; default: the task's")
    prose: str = Field(default="held_out", description="a set of the run whose text is the prose")
    text: Path | None = Field(default=None, description="a text file that is the prose, in place of a set")
    template: NonNegativeInt = Field(default=0, description="which of evaluation's templates (passkey), 0 to 7")
    extra_tokens: NonNegativeInt = Field(
        default=0, description="generated beyond the key's tokens; the key counts wherever it stands"
    )
    pass_at: float = Field(default=0.95, gt=0, le=1, description="accuracy at which a length is passed")
    rows: PositiveInt = Field(default=16, description="samples read side by side")
    chunk: PositiveInt = Field(default=512, description="tokens a sample advances at a time")
    snapshots: bool = Field(default=True, description="read shared text once; false: each prompt whole")
    cache_tokens: PositiveInt = Field(
        default=262_144, description="rows times length, at most, where the state grows (attention)"
    )

    @field_validator("task", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("lengths")
    @classmethod
    def _evaluation_lengths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        wrong = [length for length in value or () if not is_evaluation_length(length)]
        if wrong:
            raise ValueError(f"{wrong[0]} is no multiple of {LENGTH_STEP}; the training split has the other lengths")
        return value


@register_evaluation
class Passkey(Evaluation):
    """A key hidden in a long text and asked for at its end, by length and depth; RULER's needle tasks too."""

    name = "passkey"
    Settings = PasskeySettings
    Results = (PasskeyResult,)

    def __init__(self, target: Target, settings: PasskeySettings) -> None:
        super().__init__(target, settings)
        self.settings: PasskeySettings = settings
        tasks: dict[str, Task] = {
            name: chosen(
                name,
                value=settings.value,
                digits=settings.digits,
                haystack=settings.haystack,
                distractors=settings.distractors,
                queries=settings.queries,
            )
            for name in dict.fromkeys(settings.task)
        }
        prose = self._prose(tasks)
        self.lengths = self._lengths()
        self.builders: dict[str, Builder] = {}
        for name, task in tasks.items():
            try:
                self.builders[name] = Builder(
                    target.tokenizer,
                    task,
                    name=name,
                    reach=max(self.lengths),
                    seed=settings.seed,
                    template=settings.template,
                    prose=prose,
                )
            except DataError as error:
                raise UserError(str(error)) from None
            self._check(name, min(self.lengths))
        self.reader = Reader(
            target.model, settings.chunk, target.tokenizer.vocab_size, settings.extra_tokens, settings.snapshots
        )
        self._cells = self._grid()

    def _prose(self, tasks: Mapping[str, Task]) -> TokenStore | Path | None:
        if not any(task.haystack == "prose" for task in tasks.values()):
            return None
        return self.settings.text if self.settings.text is not None else self.target.store(self.settings.prose)

    def _lengths(self) -> list[int]:
        if self.settings.lengths is not None:
            return sorted(set(self.settings.lengths))
        trained = self.target.train_seq_len or 512
        return sorted({max(round(trained * m) // LENGTH_STEP, 1) * LENGTH_STEP for m in _MULTIPLES})

    def _check(self, name: str, shortest: int) -> None:
        """The grid's ends: a prompt holds its needles, and the memory its cache."""
        builder, longest = self.builders[name], max(self.lengths)
        if self.settings.lengths is None and shortest < builder.shortest:
            least = math.ceil(builder.shortest / LENGTH_STEP) * LENGTH_STEP
            self.lengths = sorted({max(length, least) for length in self.lengths})
        for length in self.lengths:  # each has distractors of its own, which leave names for its queries
            builder.prompts(length, 0.0, 1)
        if not self.target.model.bounded_state and longest > self.settings.cache_tokens:
            raise UserError(
                f"lengths: {longest} tokens, and the model's state grows with them up to cache_tokens = "
                f"{self.settings.cache_tokens}; raise cache_tokens, or leave the length out"
            )

    def cells(self) -> list[str]:
        """By task, then length, then depth, so that shared text goes on where the last cell's ended."""
        return list(self._cells)

    def follows_from(self) -> dict[str, Any]:
        """The text file's content, which the settings only name."""
        return {} if self.settings.text is None else {"text": file_digest(self.settings.text)}

    def _grid(self) -> dict[str, tuple[str, int, float]]:
        """(task, length, depth) by name."""
        depths = sorted(set(self.settings.depths))
        return {
            f"{task}-{length}-{depth!r}": (task, length, depth)
            for task in self.builders
            for length in self.lengths
            for depth in depths
        }

    def measure(self, cell: str) -> dict[str, Any]:
        """The counts of one (task, length, depth)."""
        task, length, depth = self._cells[cell]
        prompts = self.builders[task].prompts(length, depth, self.settings.samples)
        rows = self.settings.rows
        if not self.target.model.bounded_state:
            rows = max(1, min(rows, self.settings.cache_tokens // length))
        asked = self.reader.ask(prompts, rows, self.on_progress)
        right = np.concatenate([answers.right for answers in asked])
        nats = np.concatenate([answers.nats for answers in asked])
        lost = int(np.isnan(nats).sum())
        return {
            "task": task,
            "length": prompts.length,
            "depth": prompts.depth,
            "n": len(right),
            "by_token": right.sum(axis=0).tolist(),
            "nats": None if lost else float(nats.sum()),
            "not_finite": lost,
            "needles": [
                _needle(start, distance, answers)
                for start, distance, answers in zip(prompts.needles, prompts.distances, asked, strict=True)
            ],
            "tokens": {
                "shared": prompts.prefix,
                "context": prompts.context,
                "question": prompts.length - prompts.context,
                "samples": prompts.samples,
                "queries": prompts.queries,
            },
        }

    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        """One result a task."""
        found: list[Result] = []
        for task, builder in self.builders.items():
            own = [cell for cell in cells.values() if cell["task"] == task]
            grid = [grid_cell(cell) for cell in own]
            rows = by_length(grid)
            found.append(
                PasskeyResult(
                    train_seq_len=self.target.train_seq_len,
                    task=task,
                    haystack=builder.task.haystack,
                    samples=self.settings.samples,
                    queries=builder.task.queries,
                    key_tokens=builder.values.n_tokens,
                    one_token_a_digit=builder.values.one_token_a_digit,
                    chance=builder.values.chance,
                    lengths=sorted({cell.length for cell in grid}),
                    depths=sorted({cell.depth for cell in grid}),
                    cells=grid,
                    by_length=rows,
                    by_distance=by_distance(grid),
                    pass_at=self.settings.pass_at,
                    longest_passed=longest_passed(rows, self.settings.pass_at),
                    snapshots=saving([cell["tokens"] for cell in own], self.settings.chunk),
                )
            )
        return found

    @classmethod
    def page(cls, results: Sequence[Any]) -> str:
        """The section of the report."""
        return passkey_result.page(results)


def _needle(start: int, distance: int, answers: Asked) -> dict[str, int]:
    return {
        "start": start,
        "distance": distance,
        "n": len(answers.right),
        "teacher_forced": int(answers.right.all(axis=1).sum()),
        "generated": int(answers.generated.sum()),
    }


def saving(cells: Sequence[Mapping[str, int]], chunk: int) -> Saving:
    """Tokens of all prompts, and those that one process's :class:`Reader` reads for them: of each length the shared
    text once (and, for each cell, from the last multiple of ``chunk``), the rest for each sample, and the question for
    each query. Further processes (parts, a resumed call) each read the shared text of their cells once more. The
    answers' tokens, which both read, are left out."""
    prompts = sum(c["samples"] * c["queries"] * (c["context"] + c["question"]) for c in cells)
    kept: dict[int, int] = {}
    for c in cells:
        kept[c["context"]] = max(kept.get(c["context"], 0), c["shared"] // chunk * chunk)
    own = sum(
        c["shared"] % chunk + c["samples"] * (c["context"] - c["shared"] + c["queries"] * c["question"]) for c in cells
    )
    read = sum(kept.values()) + own
    return Saving(prompts=prompts, read=read, factor=prompts / read)


__all__ = ["TASKS", "Passkey", "PasskeyResult", "PasskeySettings"]
