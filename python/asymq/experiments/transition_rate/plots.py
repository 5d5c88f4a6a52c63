"""Plots of the runs of an optimizer: rates, shares of changing codes, distances of weights."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asymq.experiments.common.pictures import count_steps, write_figure
from asymq.experiments.common.words import count
from asymq.experiments.transition_rate.protocol import METHODS
from asymq.experiments.transition_rate.results import Entry, groups

# Told apart in black and white by dashes; a value by its colour.
DASHES = dict(zip(METHODS, (":", "--", "-", "-."), strict=True))


def plot(found: list[dict], out: Path) -> None:
    """Writes a picture for each task, setting and optimizer of the results `found`."""
    for key, entries in groups(found).items():
        write_figure(draw(entries), out / f"{'__'.join(key)}.png")


def draw(entries: list[Entry]) -> Figure:
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    scheduled = [entry for entry in entries if entry.cell.method == "factor"]
    (rates, learning), (flips, near) = panels
    for entry in scheduled:
        style = _style(entry, entries)
        for name, dashes in (("running", "-"), ("target", ":")):
            label = f"{name}, factor {entry.cell.value}"
            _line(rates, entry, name, **(style | {"linestyle": dashes, "label": label}))
        _line(learning, entry, "rate", **style)
    rates.set(title="running and target rate", ylabel="share of codes a step")
    learning.set(title="learning rate that follows, U", ylabel="learning rate", yscale="log")
    for entry in entries:
        _line(flips, entry, "flips", **_style(entry, entries))
        after = _mean([result["distances"]["after"] for result in entry.results])
        width = 0.5 / len(after)
        middles = [(i + 0.5) * width for i in range(len(after))]
        near.plot(middles, after, **_style(entry, entries))
    before = _mean([result["distances"]["before"] for entry in entries for result in entry.results])
    near.plot(middles, before, color="black", linewidth=1, label="before learning")
    flips.set(title="codes that change", ylabel="share a step", yscale="log")
    near.set(
        title="latent weights, after the last step",
        xlabel="distance to the nearest transition point (steps of the grid)",
        ylabel="share of weights",
    )
    if scheduled:
        rates.legend(fontsize=8)
    figure.legend(
        *near.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8
    )
    task, setting, optimizer, _ = entries[0].cell.arm
    seeds = count(max(len(entry.results) for entry in entries), "seed")
    figure.suptitle(f"{task}, {setting}, {optimizer}: mean of {seeds}")
    return figure


def _style(entry: Entry, entries: list[Entry]) -> dict:
    own = [e.cell.value for e in entries if e.cell.method == entry.cell.method]
    first = 3 * list(METHODS).index(entry.cell.method)
    return {
        "color": f"C{(first + own.index(entry.cell.value)) % 10}",
        "linestyle": DASHES[entry.cell.method],
        "linewidth": 1.2,
        "label": entry.title,
    }


def _line(axes: Axes, entry: Entry, name: str, **style) -> None:
    values = entry.series(name)
    each = entry.first["steps"] / len(values)
    axes.plot([(i + 0.5) * each for i in range(len(values))], values, **style)
    count_steps(axes)


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]
