"""The configuration's section ``optimizer``: how weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from paralm.config_base import Section


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, description="fraction of max_steps below 1, otherwise steps")
    decay: float = Field(default=0.2, ge=0, description="wsd: the decay's fraction of max_steps (or steps)")
    min_ratio: float = Field(default=0.0, ge=0, le=1, description="final learning rate over the peak")


def schedule_steps(value: float, max_steps: int) -> int:
    """A value below 1 is a fraction of the run, anything else a number of steps."""
    return round(value * max_steps) if value < 1 else round(value)


class MuonConfig(Section):
    """Of the matrices under ``optimizer.name: muon``; everything else is AdamW's."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    steps: PositiveInt = Field(default=5, description="Newton–Schulz steps")


class GradientNoiseConfig(Section):
    """Gaussian noise of variance eta / (1 + step)^gamma on every gradient element (arXiv 1511.06807)."""

    eta: NonNegativeFloat = Field(default=0.0, description="0: none; the paper tries 0.01, 0.3 and 1")
    gamma: float = Field(default=0.55, ge=0)


class SpikeConfig(Section):
    """Updates whose loss stands out from the last ones are skipped, and counted in the metrics."""

    sigmas: NonNegativeFloat = Field(default=0.0, description="standard deviations above the mean; 0: never; usual: 6")
    window: int = Field(default=128, ge=8, description="steps the mean and the deviation are taken over")


class OptimizerConfig(Section):
    name: str = Field(default="adamw", description="a registered optimizer")
    lr: PositiveFloat = 3e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    fused: bool | None = Field(
        default=None, description="AdamW's update as one kernel; default: on a GPU, and where its states are offloaded"
    )
    clip_grad_norm: NonNegativeFloat = Field(default=1.0, description="0: no clipping")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    muon: MuonConfig = Field(default_factory=MuonConfig)
    gradient_noise: GradientNoiseConfig = Field(default_factory=GradientNoiseConfig)
    skip_spikes: SpikeConfig = Field(default_factory=SpikeConfig)
