"""Plots of a table's cells: perplexity, loss, and the ranges of a few quantizers, by step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from asymq.experiments.files import write
from asymq.experiments.table2 import ORDER, order, title

# Told apart in black and white by marker and dashes.
COLORS = dict(zip(ORDER, ("C3", "C0", "C2", "C4", "C1"), strict=True))
MARKERS = dict(zip(ORDER, "so^vD", strict=True))
DASHES = ("-", "--", ":", "-.")
MARKS = 6  # a line
# Left and right of the paper's Figure 4.
PANELS = (
    ("scale_offset", "min_max", "kscale_koffset"),
    ("min_max", "beta_gamma", "beta_gamma_sigmoid"),
)
LEGEND = {"fontsize": 8, "title_fontsize": 8, "title": "parameterization, learning rate"}


def plot(found: list[dict], out: Path) -> None:
    """Writes the plots of every model of the results `found` into the folder `out`."""
    for model in dict.fromkeys(result["model"] for result in found):
        own = sorted((result for result in found if result["model"] == model), key=order)
        write_figure(_perplexity(model, own), out / f"{model}__perplexity.png")
        write_figure(_loss(model, own), out / f"{model}__loss.png")
        for lr in _rates(own):
            cells = [result for result in own if result["lr"] == lr]
            rate = cells[0]["cell"].lr
            write_figure(_ranges(model, rate, cells), out / f"{model}__ranges__{rate}.png")


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all, and closes the figure."""
    write(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    plt.close(figure)


def _rates(own: list[dict]) -> list[float]:
    return sorted({result["lr"] for result in own}, reverse=True)


def _line(axes: Axes, xs, ys, result: dict, own: list[dict], **options) -> None:
    """Lines that lie on each other show by their markers, which no two have in the same places."""
    every = max(1, len(xs) // MARKS)
    name = result["parameterization"]
    axes.plot(
        xs,
        ys,
        color=COLORS[name],
        marker=MARKERS[name],
        markevery=(own.index(result) * every // len(own), every),
        linestyle=DASHES[_rates(own).index(result["lr"]) % len(DASHES)],
        **{"markersize": 5, "linewidth": 1.2, "label": title(result), **options},
    )


def _perplexity(model: str, own: list[dict]) -> Figure:
    figure, (whole, near) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    plain = own[0]["fp_ppl"]
    for axes in (whole, near):
        for result in own:
            points = [(int(s), v) for s, v in result["ppl"].items() if not isinstance(v, str)]
            if points:
                _line(axes, *zip(*points, strict=True), result, own)
        if not isinstance(plain, str):
            axes.axhline(plain, color="black", linewidth=0.8, label="float model")
        axes.set(xlabel="training step", ylabel="perplexity on the test text")
    whole.set(yscale="log", title="all, diverged values left out")
    for ticks in (whole.yaxis.set_major_formatter, whole.yaxis.set_minor_formatter):
        ticks(LogFormatter(minor_thresholds=(1.5, 0.5)))
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=4, **LEGEND)
    near.set_title("near the float model")
    values = [v for result in own for v in result["ppl"].values() if not isinstance(v, str)]
    if not isinstance(plain, str) and values:
        close = [v for v in [*values, plain] if v < 1.25 * plain]
        margin = 0.05 * (max(close) - min(close)) or 0.1
        near.set_ylim(min(close) - margin, max(close) + margin)
    figure.suptitle(model)
    return figure


def _loss(model: str, own: list[dict]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    window = draw_losses(panels, own)
    figure.suptitle(f"{model}, mean of the last {window} training batches")
    return figure


def draw_losses(panels: Iterable[Axes], own: list[dict]) -> int:
    """Draws the losses of a model's results as PANELS has them, each point the mean of some last
    training batches; returns how many."""
    window = loss_window(own)
    for axes, names in zip(panels, PANELS, strict=True):
        shown = [result for result in own if result["parameterization"] in names]
        for result in shown:
            means = loss_means(result["loss"], window)
            _line(axes, range(window, window + len(means)), means, result, shown)
        axes.set(xlabel="training step", ylabel="cross-entropy loss (nats per token)")
        if shown:
            axes.legend(**LEGEND)
    return window


def loss_window(own: list[dict]) -> int:
    """How many losses a mean is taken of: a twentieth of the steps."""
    return max(1, own[0]["settings"]["steps"] // 20)


def loss_means(losses: list[float | None], window: int) -> list[float]:
    """Means of `window` losses each, up to where a loss is not finite."""
    values = losses[: losses.index(None)] if None in losses else losses
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def _ranges(model: str, rate: str, cells: list[dict]) -> Figure:
    names = list(cells[0]["trajectories"])
    columns = 3
    rows = math.ceil(len(names) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(11, 3.2 * rows), layout="constrained", squeeze=False
    )
    for i, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
        for result in cells:
            steps, lows, highs = zip(*result["trajectories"][name], strict=True)
            for ends, label in ((highs, title(result)), (lows, None)):
                ends = [math.nan if end is None else end for end in ends]
                _line(axes, steps, ends, result, cells, label=label)
        # Far away ranges leave the picture: the others would be flat lines in it.
        _, low, high = cells[0]["trajectories"][name][0]
        bottom, top = axes.get_ylim()
        margin = high - low
        axes.set_ylim(max(bottom, low - margin), min(top, high + margin))
        axes.set_title(name.removesuffix("_quantizer"), fontsize=9)
        axes.set(
            xlabel="training step" if i >= len(names) - columns else "",
            ylabel="range (tensor's unit)" if i % columns == 0 else "",
        )
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"{model}: both ends of the ranges of some activations while they learn")
    return figure
