"""Plots of a table's cells: perplexity, loss, and the ranges of a few quantizers, by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from asymq.experiments.common.pictures import count_steps, write_figure
from asymq.experiments.common.words import count
from asymq.experiments.table2.results import Entry, by_model, label

# Told apart in black and white by marker and dashes.
STYLES = {
    "scale_offset": ("C3", "s"),
    "min_max": ("C0", "o"),
    "beta_gamma": ("C2", "^"),
    "beta_gamma_sigmoid": ("C4", "v"),
    "kscale_koffset": ("C1", "D"),
}
_MORE_STYLES = (("C5", "P"), ("C6", "X"), ("C8", "<"), ("C9", ">"))
DASHES = ("-", "--", ":", "-.")
MARKS = 6  # a line
WIDEST, NARROWEST = 2.2, 1.0
BAND = 0.15  # opacity
# In the left panel of losses; on their scale the others are one line.
FAR_ABOVE = ("scale_offset", "kscale_koffset")
LEGEND = {"fontsize": 8, "title_fontsize": 8, "title": "parameterization, learning rate"}


def plot(found: list[dict], out: Path) -> None:
    """Writes the plots of every model of the results `found` into the folder `out`."""
    for model, own in by_model(found).items():
        write_figure(draw_perplexity(model, own), out / f"{model}__perplexity.png")
        write_figure(draw_loss(model, own), out / f"{model}__loss.png")
        for lr in dict.fromkeys(entry.column[1] for entry in own):
            shown = [entry for entry in own if entry.column[1] == lr]
            rate = shown[0].lr
            write_figure(draw_ranges(model, rate, shown), out / f"{model}__ranges__{rate}.png")


def style(parameterization: str) -> tuple[str, str]:
    """Colour and marker; one that has none of its own gets some by its name."""
    if parameterization in STYLES:
        return STYLES[parameterization]
    return _MORE_STYLES[sum(parameterization.encode()) % len(_MORE_STYLES)]


def _line(axes: Axes, xs: Sequence, ys: Sequence, entry: Entry, own: list[Entry], **options):
    """Of lines that lie on each other the lower ones are wider, and no two have their markers in
    the same places."""
    every, place = max(1, len(xs) // MARKS), own.index(entry)
    color, marker = style(entry.column[0])
    rates = sorted({other.column[1] for other in own}, reverse=True)
    width = WIDEST - (WIDEST - NARROWEST) * place / max(1, len(own) - 1)
    axes.plot(
        xs,
        ys,
        color=color,
        marker=marker,
        markevery=(place * every // len(own), every),
        linestyle=DASHES[rates.index(entry.column[1]) % len(DASHES)],
        **{"markersize": 5, "linewidth": width, "label": entry.title, **options},
    )


# ---- perplexity --------------------------------------------------------------------------------


def draw_perplexity(model: str, own: list[Entry]) -> Figure:
    """All of it, and what is near the float model's. Of several seeds the mean, and a band from
    the least to the largest."""
    figure, (whole, near) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    plain = own[0].first["fp_ppl"]
    for axes in (whole, near):
        for entry in own:
            _perplexities(axes, entry, own)
        if not isinstance(plain, str):
            axes.axhline(plain, color="black", linewidth=0.8, label="float model")
        axes.set_ylabel("perplexity on the test text")
        count_steps(axes)
    whole.set(yscale="log", title="all, diverged values left out")
    for ticks in (whole.yaxis.set_major_formatter, whole.yaxis.set_minor_formatter):
        ticks(LogFormatter(minor_thresholds=(1.5, 0.5)))
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=4, **LEGEND)
    near.set_title("near the float model")
    values = [v for entry in own for some in entry.perplexities().values() for v in some]
    if not isinstance(plain, str) and values:
        close = [v for v in [*values, plain] if v < 1.25 * plain]
        margin = 0.05 * (max(close) - min(close)) or 0.1
        near.set_ylim(min(close) - margin, max(close) + margin)
    seeds = len(own[0].results)
    figure.suptitle(f"{model}, mean of {count(seeds, 'seed')}" if seeds > 1 else model)
    return figure


def _perplexities(axes: Axes, entry: Entry, own: list[Entry]) -> None:
    points = entry.perplexities()
    if not points:
        return
    steps, values = list(points), list(points.values())
    if len(entry.results) > 1:
        color, _ = style(entry.column[0])
        ends = list(map(min, values)), list(map(max, values))
        axes.fill_between(steps, *ends, color=color, alpha=BAND, linewidth=0)
    _line(axes, steps, [sum(some) / len(some) for some in values], entry, own)


# ---- loss --------------------------------------------------------------------------------------


def draw_loss(model: str, own: list[Entry]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    window = draw_losses(panels, own)
    figure.suptitle(model + of_last(window))
    return figure


def of_last(window: int) -> str:
    """What a loss is the mean of, as the end of a title."""
    return "" if window == 1 else f", mean of the last {count(window, 'training batch', 'es')}"


def draw_losses(panels: Iterable[Axes], own: list[Entry]) -> int:
    """Draws the losses of a model, those that may be far above the others in the left panel. Each
    point is the mean of some last training batches; returns how many."""
    window = loss_window(own)
    left = [entry for entry in own if entry.column[0] in FAR_ABOVE]
    right = [entry for entry in own if entry.column[0] not in FAR_ABOVE]
    for axes, shown in zip(panels, (left, right), strict=True):
        if not shown:
            axes.set_visible(False)
            continue
        for entry in shown:
            means = loss_means(entry.losses(), window)
            _line(axes, range(window, window + len(means)), means, entry, shown)
        names = dict.fromkeys(label(entry.column[0]) for entry in shown)
        axes.set(ylabel="cross-entropy loss (nats per token)", title=", ".join(names))
        count_steps(axes)
        axes.legend(**LEGEND)
    return window


def loss_window(own: list[Entry]) -> int:
    """How many losses a mean is taken of: a twentieth of the steps."""
    return max(1, own[0].first["settings"]["steps"] // 20)


def loss_means(losses: list[float], window: int) -> list[float]:
    """Means of `window` losses each."""
    return [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]


# ---- ranges ------------------------------------------------------------------------------------


def draw_ranges(model: str, rate: str, own: list[Entry]) -> Figure:
    """Of the first seed."""
    names = list(own[0].first["trajectories"])
    columns = 3
    rows = math.ceil(len(names) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(11, 3.2 * rows), layout="constrained", squeeze=False
    )
    for i, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
        _ranges(axes, name, own)
        if i < len(names) - columns:
            axes.set_xlabel("")
        if i % columns == 0:
            axes.set_ylabel("range (tensor's unit)")
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(
        f"{model}, learning rate {rate}: both ends of the ranges of some activations while they "
        "learn"
    )
    return figure


def _ranges(axes: Axes, name: str, own: list[Entry]) -> None:
    for entry in own:
        steps, lows, highs = zip(*entry.first["trajectories"][name], strict=True)
        for ends, title in ((highs, entry.title), (lows, None)):
            drawn = [math.nan if end is None else end for end in ends]
            _line(axes, steps, drawn, entry, own, label=title)
    # Far away ranges leave the picture: the others would be flat lines in it.
    _, low, high = own[0].first["trajectories"][name][0]
    bottom, top = axes.get_ylim()
    margin = high - low
    axes.set_ylim(max(bottom, low - margin), min(top, high + margin))
    axes.set_title(name.removesuffix("_quantizer"), fontsize=9)
    count_steps(axes)
