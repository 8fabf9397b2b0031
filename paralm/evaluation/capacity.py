"""``paralm eval capacity``: how large the state is, layer by layer, beside the longest length passed.

The state is all there is of what was read, convolutions' last inputs included; so its size bounds what a model can
hold. One that grows is given by its growth a token. Measured and not read off a formula: the state that a sequence
carries after some tokens is counted, and a mixer that declares a bounded state and grows is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field, PositiveInt

from paralm.errors import RunError
from paralm.evaluation import markdown as md
from paralm.evaluation.cells import file_digest
from paralm.evaluation.perplexity import PerplexityResult
from paralm.evaluation.result import Result, eval_dir
from paralm.evaluation.suite import (
    Evaluation,
    EvaluationSettings,
    evaluations,
    read_result,
    register_evaluation,
)
from paralm.models import LanguageModel
from paralm.models.hybrid import layer_mixers
from paralm.models.mixers.base import named_leaves

FITTED = (0.91, 13.0)  # millions of state elements that the published fits were made on


class CapacitySettings(EvaluationSettings):
    """Of ``paralm eval capacity``."""

    tokens: PositiveInt = Field(default=64, description="read before the state is counted, and as many again after")


class LeafSize(BaseModel):
    """One tensor of a layer's state, of one sequence."""

    path: str  # "conv", "cell/0", …
    shape: list[int]  # without the batch
    dtype: str
    elements: int
    n_bytes: int
    bytes_per_token: float  # growth; 0 for a bounded one
    conv: bool  # the last inputs of a convolution


class LayerSize(BaseModel):
    """The state of one layer."""

    layer: int
    mixer: str
    leaves: list[LeafSize]

    @property
    def elements(self) -> int:
        """Of all leaves."""
        return sum(leaf.elements for leaf in self.leaves)

    @property
    def n_bytes(self) -> int:
        """Of all leaves."""
        return sum(leaf.n_bytes for leaf in self.leaves)


class Passed(BaseModel):
    """How far another evaluation found the model to work. ``length`` None: at no length tested."""

    evaluation: str
    rule: str
    length: int | None
    tested: int  # the longest length there was
    step: int


class CapacityResult(Result):
    """Sizes of the state that one sequence carries after ``tokens`` tokens."""

    kind: ClassVar[str] = "capacity"

    parameters: int
    tokens: int
    bounded: bool
    elements: int
    conv_elements: int  # of them
    n_bytes: int
    bytes_per_token: float  # growth; 0 for a bounded state
    layers: list[LayerSize]
    passed: list[Passed]
    fitted_forget_tokens: float | None  # of the published fit, for Mamba2 within the fit's range

    def scalars(self) -> dict[str, float]:
        """For TensorBoard."""
        found = {
            "elements": float(self.elements),
            "bytes": float(self.n_bytes),
            "bytes_per_token": self.bytes_per_token,
        }
        return found | {f"longest_{p.evaluation}": float(p.length or 0) for p in self.passed}


@register_evaluation
class Capacity(Evaluation):
    """Size of the state, layer by layer (convolutions included), beside the longest length passed."""

    name = "capacity"
    Settings = CapacitySettings
    Results = (CapacityResult,)
    settings: CapacitySettings

    def follows_from(self) -> dict[str, Any]:
        """The results that lengths are read from."""
        return {path.name: file_digest(path) for path in _length_files(eval_dir(self.target.run_dir))}

    def cells(self) -> list[str]:
        """One."""
        return ["state"]

    def measure(self, cell: str) -> dict[str, Any]:
        """Read some tokens, and as many again, and count."""
        layers = state_sizes(self.target.model, self.settings.tokens)
        return {"layers": [layer.model_dump() for layer in layers]}

    def combine(self, cells: Mapping[str, dict[str, Any]]) -> list[Result]:
        """Totals, and what other evaluations found."""
        layers = [LayerSize.model_validate(layer) for layer in cells["state"]["layers"]]
        leaves = [leaf for layer in layers for leaf in layer.leaves]
        elements = sum(leaf.elements for leaf in leaves)
        bounded = self.target.model.bounded_state
        mamba2 = bounded and all(layer.mixer == "mamba2" for layer in layers)
        return [
            CapacityResult(
                parameters=sum(p.numel() for p in self.target.model.parameters()),
                tokens=self.settings.tokens,
                bounded=bounded,
                elements=elements,
                conv_elements=sum(leaf.elements for leaf in leaves if leaf.conv),
                n_bytes=sum(leaf.n_bytes for leaf in leaves),
                bytes_per_token=sum(leaf.bytes_per_token for leaf in leaves),
                layers=layers,
                passed=read_lengths(eval_dir(self.target.run_dir)),
                fitted_forget_tokens=published_fit(elements) if mamba2 else None,
            )
        ]

    @classmethod
    def page(cls, results: Sequence[CapacityResult]) -> str:
        """Tables."""
        return "\n\n".join(_page(result) for result in results)


@torch.no_grad()
def state_sizes(model: LanguageModel, tokens: int = 64) -> list[LayerSize]:
    """Sizes of the state of one sequence after ``tokens`` tokens, and its growth over as many more, of each layer.

    Raises RuntimeError for a mixer that declares a bounded state and whose state grew.
    """
    read = torch.zeros(1, tokens, dtype=torch.int64, device=model.head_weight.device)
    first = model(read, last_logits=True).state
    second = model(read, state=first, last_logits=True).state
    found = []
    names = [spec["name"] for spec in layer_mixers(model.config)]
    for layer, mixer in enumerate(model.mixers):
        before, after = dict(named_leaves(first["layers"][layer])), dict(named_leaves(second["layers"][layer]))
        leaves = [
            LeafSize(
                path=path,
                shape=list(leaf.shape[1:]),
                dtype=str(leaf.dtype).removeprefix("torch."),
                elements=leaf.numel(),
                n_bytes=_bytes(leaf),
                bytes_per_token=(_bytes(after[path]) - _bytes(leaf)) / tokens,
                conv=mixer.leaf(path).conv or "conv" in path.split("/"),
            )
            for path, leaf in before.items()
        ]
        grown = [leaf.path for leaf in leaves if leaf.bytes_per_token]
        if mixer.bounded_state and (grown or before.keys() != after.keys()):
            raise RuntimeError(f"layer {layer}: {names[layer]} declares bounded_state, and {grown or list(after)} grew")
        found.append(LayerSize(layer=layer, mixer=names[layer], leaves=leaves))
    return found


def _bytes(leaf: torch.Tensor) -> int:
    return leaf.numel() * leaf.element_size()


def published_fit(elements: int) -> float | None:
    """Training length (tokens) below which a Mamba2 of so many state elements was found to collapse past it:
    5.172·N − 4.469 thousand tokens for N million elements (arXiv 2410.07145); None outside the range it was made on.
    """
    millions = elements / 1e6
    return 1000 * (5.172 * millions - 4.469) if FITTED[0] <= millions <= FITTED[1] else None


# -- how far it works ----------------------------------------------------------------------------------------


def _length_files(folder: Path) -> list[Path]:
    """Results that say how far the model works, of whatever evaluation is there."""
    found = [folder / "perplexity.json", *sorted(folder.glob("passkey*.json"))]
    return [path for path in found if path.is_file()]


def read_lengths(folder: Path) -> list[Passed]:
    """What ``eval/perplexity.json`` and ``eval/passkey*.json`` say of lengths; damaged or foreign files say nothing."""
    found = []
    kinds = evaluations()
    for path in _length_files(folder):
        kind = kinds.get(path.stem.split("_")[0])
        try:
            result = read_result(kind, path) if kind is not None else None
        except RunError:
            continue
        if isinstance(result, PerplexityResult):
            passed = perplexity_passed(result)
            if passed is not None:
                found.append(passed)
        elif result is not None and hasattr(result, "longest_passed"):
            lengths: list[int] = list(getattr(result, "lengths", []))
            found.append(
                Passed(
                    evaluation=result.name,
                    rule=f"at every length up to it ≥ {getattr(result, 'pass_at', 0):.0%} of the keys are generated",
                    length=result.longest_passed,
                    tested=max(lengths, default=0),
                    step=result.step,
                )
            )
    return found


def perplexity_passed(result: PerplexityResult) -> Passed | None:
    """Up to which position the loss is not above that at the training length, by their intervals.

    A bucket fails if its 95 % interval lies wholly above that of the last bucket within the training length; the
    length passed is the last position before the first one that fails, and none that no document has. None if the
    training length is unknown, no bucket is within it, intervals are missing (fewer than two documents), or the model
    forgot on the way (``reset_every``): then a position is not a length that was read.
    """
    if result.reset_every is not None:
        return None
    length = result.train_seq_len
    inside = [b for b in result.by_position if length and b.last <= length + 1 and b.interval is not None]
    if not inside:
        return None
    reference = inside[-1]
    assert reference.interval is not None
    longest = max(result.documents.tokens, default=None)  # a document of n predictions ends at position n
    passed = tested = min(reference.last, longest or reference.last)
    failed = False
    for bucket in result.by_position:
        if bucket.first <= reference.last or bucket.interval is None:
            continue
        tested = min(bucket.last, longest or bucket.last)
        failed = failed or bucket.interval[0] > reference.interval[1]
        passed = passed if failed else tested
    rule = "no position's loss lies above that at the training length, by 95 % intervals"
    return Passed(evaluation=result.name, rule=rule, length=passed, tested=tested, step=result.step)


# -- page ----------------------------------------------------------------------------------------------------


def _page(result: CapacityResult) -> str:
    growing = (
        "" if result.bounded else f" after {result.tokens} tokens, and {result.bytes_per_token:,.0f} bytes a token"
    )
    parts = [
        f"One sequence carries **{result.elements:,} elements, {result.n_bytes:,} bytes**{growing}"
        f" ({result.conv_elements:,} elements of them are convolutions' last inputs), in a model of "
        f"{result.parameters:,} parameters."
    ]
    if result.passed:
        rows = [
            [
                p.evaluation + ("" if p.step == result.step else f" (step {p.step:,})"),
                _length(p),
                f"{p.tested:,}",
                f"{result.elements / p.length:,.1f}" if p.length else "–",
                p.rule,
            ]
            for p in result.passed
        ]
        header = ["evaluation", "longest length passed", "longest tested", "state elements a token of it", "passed if"]
        parts.append(md.table(header, rows, right=(1, 2, 3)))
    else:
        parts.append("No length is known that it passes: `paralm eval perplexity` and `paralm eval passkey` say.")
    if result.fitted_forget_tokens is not None:
        parts.append(
            f"A published fit over Mamba2 models up to 370M (arXiv 2410.07145) puts the training length that such a "
            f"state needs not to collapse at {result.fitted_forget_tokens:,.0f} tokens."
        )
    rows = []
    for layer in result.layers:
        for leaf in layer.leaves:
            shape = " × ".join(map(str, leaf.shape)) or "scalar"
            grows = f"{leaf.bytes_per_token:,.0f}" if leaf.bytes_per_token else ""
            rows.append(
                [f"{layer.layer}", layer.mixer, md.code(leaf.path), shape, leaf.dtype, f"{leaf.n_bytes:,}", grows]
            )
    shown = _folded(rows)
    header = ["layer", "mixer", "state", "shape", "dtype", "bytes", "bytes more a token"]
    return "\n\n".join([*parts, md.table(header, shown, right=(0, 5, 6))])


def _length(passed: Passed) -> str:
    if passed.length is None:
        return "none"
    return f"{passed.length:,}" + (" (all)" if passed.length >= passed.tested else "")


def _folded(rows: list[list[str]]) -> list[list[str]]:
    """Rows that differ in the layer alone as one: ``0 – 11``."""
    found: dict[tuple[str, ...], list[str]] = {}
    for layer, *rest in rows:
        found.setdefault(tuple(rest), []).append(layer)
    return [[_span(layers), *rest] for rest, layers in found.items()]


def _span(layers: list[str]) -> str:
    numbers = [int(layer) for layer in layers]
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} – {numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(layers)
