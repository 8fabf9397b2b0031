"""What the collapse evaluation finds: verdicts, curves and states by position, as JSON, figures and a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from paralm.evaluation import markdown as md
from paralm.evaluation.collapse_rule import Departure, Verdict, departure, judge
from paralm.evaluation.result import Result
from paralm.evaluation.state_statistics import LeafStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 8
"""Heads that a table or a figure shows."""


class Reading(BaseModel):
    """Natural text read with carried state, by one model: as it is, or under a mitigation."""

    mitigation: str  # empty: none
    loss: list[list[float]]  # nats a token, streams × buckets
    verdict: Verdict  # of what is lost against the same tokens read afresh by the model as it is
    loss_verdict: Verdict  # of the loss itself
    departures: list[Departure]  # heads that leave the range they had within the training length
    heads: int  # of so many

    @property
    def label(self) -> str:
        """For figures and tables."""
        return self.mitigation or "as trained"

    def mean(self) -> NDArray[np.float64]:
        """Loss by bucket."""
        return np.asarray(self.loss).mean(axis=0)


class TextStates(BaseModel):
    """The states of one text by checkpoint, and the loss by bucket."""

    text: str
    loss: list[float]
    states: list[list[LeafStatistics]]  # one list a checkpoint


class CollapseResult(Result):
    """Everything by position: ``edges`` are positions in tokens, buckets lie between, checkpoints at their ends."""

    kind: ClassVar[str] = "collapse"

    set: str
    length: int
    streams: int
    edges: list[int]
    afresh: list[list[float]]  # loss of the same tokens from a state ½ to 1 training length old, streams × buckets
    readings: list[Reading]  # the model as it is first
    texts: list[TextStates]

    @property
    def plain(self) -> Reading:
        """The model as it is."""
        return self.readings[0]

    def scalars(self) -> dict[str, float]:
        """For TensorBoard; an onset that is not there is no scalar."""
        verdict = self.plain.verdict
        found = {
            "collapse": float(verdict.verdict == "collapse"),
            "rise_at_the_end": verdict.rise[-1],
            "heads_left": float(len({(d.layer, d.leaf, d.head) for d in self.plain.departures})),
        }
        return found if verdict.onset is None else {**found, "onset": verdict.onset}

    # -- figures -------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Figure]:
        """Loss by position, as it is and under mitigations; norms and ranks of the heads by position."""
        return {"loss": self._loss(), "states": self._states()}

    def _loss(self) -> Figure:
        from paralm.evaluation import figures

        figure, (left, right) = figures.row(2)
        middle = np.sqrt(np.maximum(1, self.edges[:-1]) * np.asarray(self.edges[1:], dtype=float))
        left.plot(middle, np.asarray(self.afresh).mean(axis=0), color=figures.GREY, label="read afresh")
        for index, reading in enumerate(self.readings):
            color = figures.CYCLE[index % len(figures.CYCLE)]
            rise, error = np.asarray(reading.verdict.rise), np.asarray(reading.verdict.rise_se)
            left.plot(middle, reading.mean(), marker=".", color=color, label=reading.label)
            right.plot(middle, rise, marker=".", color=color, label=reading.label)
            right.fill_between(middle, rise - error, rise + error, color=color, alpha=0.15, linewidth=0)
        for axes, what in ((left, "loss (nats per token)"), (right, "rise against reading afresh (nats)")):
            self._by_position(axes, what)
        right.axhline(0, color=figures.GREY, linewidth=0.8)
        verdict = self.plain.verdict
        if verdict.onset is not None and verdict.onset_interval is not None:
            low, high = (min(end, self.length) for end in verdict.onset_interval)
            right.axvspan(low, high, color=figures.GREY, alpha=0.15, linewidth=0, label="onset as trained, 95 %")
        for axes in (left, right):
            axes.legend(frameon=False, fontsize=8)
        left.set_title(f"Natural text, {self.streams} streams of {self.length:,} tokens")
        right.set_title(f"As trained: {verdict.verdict if verdict.verdict != 'none' else 'no collapse'}")
        return figure

    def _states(self) -> Figure:
        from paralm.evaluation import figures

        figure, panels = figures.row(len(self.texts) + 1)
        heads = self._notable_heads()
        for axes, text in zip(panels, self.texts, strict=False):
            for index, (layer, leaf, head) in enumerate(heads):
                norms = [np.median(found.norm[head]) for found in _leaf(text, layer, leaf)]
                axes.plot(self.edges[1:], norms, color=figures.CYCLE[index], label=f"layer {layer} {leaf} {head}")
            self._by_position(axes, "norm of a head's state")
            axes.set_yscale("log")
            axes.set_title(f"{text.text} text" if text.text != "newlines" else "newlines only")
        for index, (layer, leaf, head) in enumerate(heads):
            ranks = [found.rank[head] for found in _leaf(self.texts[0], layer, leaf) if found.rank is not None]
            if ranks:
                panels[-1].plot(self.edges[1:], ranks, color=figures.CYCLE[index])
        self._by_position(panels[-1], "effective rank")
        panels[-1].set_title(f"{self.texts[0].text} text")
        panels[0].legend(frameon=False, fontsize=7)
        return figure

    def _by_position(self, axes: Axes, what: str) -> None:
        from paralm.evaluation import figures

        figures.style(axes, "position (tokens)", what)
        axes.set_xscale("log", base=2)
        figures.short_axis(axes)
        if self.train_seq_len:
            figures.mark(axes, self.train_seq_len, "training length")

    def _notable_heads(self) -> list[tuple[int, str, int]]:
        """Heads whose norm is furthest past the training length from what it was within, matrices first."""
        text, inside = self.texts[0], [edge <= (self.train_seq_len or 0) for edge in self.edges[1:]]
        found: list[tuple[bool, float, int, str, int]] = []
        for leaf in text.states[0]:
            series = np.asarray([np.median(state.norm, axis=1) for state in _leaf(text, leaf.layer, leaf.leaf)])
            top = series[np.asarray(inside)].max(axis=0).clip(min=1e-30)
            for head, ratio in enumerate(series[-1] / top):
                found.append((leaf.rank is None, -float(ratio), leaf.layer, leaf.leaf, head))
        return [(layer, name, head) for _, _, layer, name, head in sorted(found)[:SHOWN]]

    # -- page ----------------------------------------------------------------------------------------------------

    def page(self) -> str:
        """The section of ``eval/report.md``."""
        verdict = self.plain.verdict
        parts = [
            f"**{_capital(verdict.sentence)}.** {self.streams} streams of {self.length:,} tokens of {self.set} text, "
            f"state carried, the model trained on {self.train_seq_len:,} tokens at a time. A rise is what the carried "
            "state loses against reading the same tokens from a state half to one training length old, beyond what "
            "it loses so within the training length; the rule is that of `paralm/evaluation/collapse_rule.py`. By "
            f"the loss alone: {self.plain.loss_verdict.sentence}.",
            "![Loss by position](collapse_loss.png)",
        ]
        if len(self.readings) > 1:
            parts.append("### Mitigations")
        inside, past = self._columns()
        parts.append(
            md.table(
                ["", "verdict", "onset", "rise at the end", "loss within", "loss past", "heads that left their range"],
                [self._row(reading, inside, past) for reading in self.readings],
                right=range(2, 7),
            )
        )
        parts += ["### Layers and heads", *self._heads_page(), "![States by position](collapse_states.png)"]
        return "\n\n".join(parts)

    def _columns(self) -> tuple[slice, slice]:
        """Buckets of the last octave within the training length, and of the last octave of all."""
        at = self.edges.index(self.train_seq_len or 0)
        return slice(max(0, at - 2), at), slice(-2, None)

    def _row(self, reading: Reading, inside: slice, past: slice) -> list[str]:
        v = reading.verdict
        onset = "–" if v.onset is None else f"{v.onset:,.0f} ({md.interval(v.onset_interval, 0)})"
        left = len({(d.layer, d.leaf, d.head) for d in reading.departures})
        mean = reading.mean()
        return [
            reading.label,
            "no collapse" if v.verdict == "none" else v.verdict,
            onset,
            f"{v.rise[-1]:+.3f} ± {v.rise_se[-1]:.3f}",
            f"{mean[inside].mean():.3f}",
            f"{mean[past].mean():.3f}",
            f"{left} of {reading.heads}",
        ]

    def _heads_page(self) -> list[str]:
        found = sorted(self.plain.departures, key=lambda d: -max(d.ratio, 1 / d.ratio if d.ratio else np.inf))
        if not found:
            return ["No head's norm or most extreme channel leaves the range it had within the training length."]
        rows = [
            [str(d.layer), d.leaf, str(d.head), d.statistic, f"{d.onset:,.0f}", f"{d.ratio:.3g}"] for d in found[:SHOWN]
        ]
        more = [f"And {len(found) - SHOWN} more, in collapse.json."] if len(found) > SHOWN else []
        return [
            md.table(["layer", "leaf", "head", "statistic", "from", "times its range"], rows, right=range(4, 6)),
            *more,
        ]


def build_result(
    cells: Mapping[str, dict[str, Any]], edges: list[int], train_seq_len: int, set_name: str
) -> CollapseResult:
    """From cells: "afresh", a text's name, or "natural+MITIGATION"; the verdicts are made here."""
    afresh = _means(cells["afresh"])
    readings = []
    for name, cell in cells.items():
        text, _, mitigation = name.partition("+")
        if text != "natural":
            continue
        loss = _means(cell)
        left, heads = _departures(cell["states"], edges, train_seq_len)
        readings.append(
            Reading(
                mitigation=mitigation,
                loss=loss.tolist(),
                verdict=judge(loss - afresh, edges, train_seq_len),
                loss_verdict=judge(loss, edges, train_seq_len),
                departures=left,
                heads=heads,
            )
        )
    texts = [
        TextStates(text=name, loss=_means(cell).mean(axis=0).tolist(), states=cell["states"])
        for name, cell in cells.items()
        if "states" in cell and "+" not in name
    ]
    return CollapseResult(
        train_seq_len=train_seq_len,
        set=set_name,
        length=edges[-1],
        streams=len(afresh),
        edges=edges,
        afresh=afresh.tolist(),
        readings=readings,
        texts=texts,
    )


def _means(cell: dict[str, Any]) -> NDArray[np.float64]:
    """Nats a token, streams × buckets. A bucket without a prediction (a lone end of a document) has that before it."""
    nats, tokens = np.asarray(cell["nats"]), np.asarray(cell["tokens"])
    means = nats / np.maximum(tokens, 1)
    for bucket in range(1, means.shape[1]):
        means[:, bucket] = np.where(tokens[:, bucket] > 0, means[:, bucket], means[:, bucket - 1])
    return means


def _departures(states: list[Any], edges: list[int], train_seq_len: int) -> tuple[list[Departure], int]:
    """Heads that leave their range by their norm or their most extreme channel; and how many heads there are."""
    found, heads = [], 0
    for index, leaf in enumerate(states[0]):
        heads += len(leaf["norm"])
        for statistic in ("norm", "extreme"):
            values = np.asarray([checkpoint[index][statistic] for checkpoint in states], dtype=np.float64)
            for head in range(values.shape[1]):
                left = departure(
                    values[:, head].T,
                    edges[1:],
                    train_seq_len,
                    layer=leaf["layer"],
                    leaf=leaf["leaf"],
                    head=head,
                    statistic=statistic,
                )
                if left is not None:
                    found.append(left)
    return found, heads


def _leaf(text: TextStates, layer: int, leaf: str) -> list[LeafStatistics]:
    """One leaf's statistics by checkpoint."""
    return [next(f for f in state if (f.layer, f.leaf) == (layer, leaf)) for state in text.states]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
