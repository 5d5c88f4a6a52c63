"""δ against N, D and G with the fitted law, and predicted against measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asymq.experiments.common.pictures import write_figure
from asymq.experiments.scaling_law.runs import Difference
from asymq.scaling_law import Law

AXES = {"params": "parameters N", "tokens": "tokens D", "group": "elements a range G"}
MARKERS = "os^vDPX<>p"
FINE = 60  # points of a line


def plot(found: list[Difference], laws: dict[str, Law], out: Path) -> None:
    """A picture for each law."""
    for precision, law in laws.items():
        own = [run for run in found if run.precision == precision]
        write_figure(draw(precision, own, law), out / f"{precision}.png")


def draw(precision: str, found: list[Difference], law: Law) -> Figure:
    figure, panels = plt.subplots(1, 4, figsize=(18, 4.5), layout="constrained")
    for axis, panel in zip(AXES, panels, strict=False):
        _draw_against(axis, panel, found, law)
    measured = [run.delta for run in found]
    predicted = law.delta(*(np.array([getattr(run, name) for run in found]) for name in AXES))
    panel = panels[-1]
    panel.plot(measured, predicted, "o", alpha=0.6)
    ends = [min(*measured, *predicted), max(*measured, *predicted)]
    panel.plot(ends, ends, "k--", linewidth=1)
    panel.set(xlabel="δ measured", ylabel="δ of the law")
    figure.suptitle(f"{precision}: by how much quantization raises the loss (nats a token)")
    return figure


def _draw_against(axis: str, panel: Axes, found: list[Difference], law: Law) -> None:
    """A line for each value of one other axis, at one value of the third: the tokens are most, or
    the group is that which most runs have."""
    lines, fixed = {
        "params": ("group", "tokens"),
        "tokens": ("params", "group"),
        "group": ("params", "tokens"),
    }[axis]
    at = _chosen(fixed, found)
    shown = [run for run in found if getattr(run, fixed) == at]
    for i, value in enumerate(sorted({getattr(run, lines) for run in shown})):
        own = [run for run in shown if getattr(run, lines) == value]
        places = sorted({getattr(run, axis) for run in own})
        means = [
            statistics.fmean(run.delta for run in own if getattr(run, axis) == x) for x in places
        ]
        color, marker = f"C{i % 10}", MARKERS[i % len(MARKERS)]
        panel.plot(places, means, marker, color=color, label=f"{AXES[lines][-1]} = {value:,.4g}")
        fine = np.geomspace(places[0], places[-1], FINE)
        panel.plot(fine, law.delta(**{axis: fine, lines: value, fixed: at}), "-", color=color)
    panel.set(xscale="log", xlabel=f"{AXES[axis]}, at {AXES[fixed][-1]} = {at:,.4g}", ylabel="δ")
    panel.legend(fontsize=8)


def _chosen(fixed: str, found: Iterable[Difference]) -> float:
    values = [getattr(run, fixed) for run in found]
    return max(values) if fixed == "tokens" else statistics.mode(sorted(values))
