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
from asymq.experiments.table2.results import Entry, apart, by_model, label

# Told apart in black and white by marker and dashes.
STYLES = {
    "scale_offset": ("C3", "s"),
    "min_max": ("C0", "o"),
    "beta_gamma": ("C2", "^"),
    "beta_gamma_sigmoid": ("C4", "v"),
    "beta_gamma_exp": ("C8", ">"),
    "beta_gamma_softplus": ("C9", "<"),
    "beta_gamma_clamp": ("C7", "p"),
    "kscale_koffset": ("C1", "D"),
}
_MORE_STYLES = (("C5", "P"), ("C6", "X"), ("C8", "<"), ("C9", ">"))
_MARKERS = "os^vDPX<>p"  # of recipes, which get a colour each too
DASHES = ("-", "--", ":", "-.")
MARKS = 6  # a line
WIDEST, NARROWEST = 2.2, 1.0
BAND = 0.15  # opacity
# In the left panel of losses; on their scale the others are one line.
FAR_ABOVE = ("scale_offset", "kscale_koffset")
LEGEND = {"fontsize": 8, "title_fontsize": 8}


def plot(found: list[dict], out: Path) -> None:
    """Writes the plots of every model of the results `found` into the folder `out`."""
    papers, recipes = apart(found)
    for model, own in by_model(papers).items():
        write_figure(draw_perplexity(model, own), out / f"{model}__perplexity.png")
        write_figure(draw_loss(model, own), out / f"{model}__loss.png")
        for lr in dict.fromkeys(entry.column[1] for entry in own):
            shown = [entry for entry in own if entry.column[1] == lr]
            rate = shown[0].lr
            write_figure(
                draw_ranges(f"{model}, learning rate {rate}", shown),
                out / f"{model}__ranges__{rate}.png",
            )
    for model, own in by_model(recipes).items():
        write_figure(draw_perplexity(model, own), out / f"{model}__recipes__perplexity.png")
        write_figure(draw_loss(model, own), out / f"{model}__recipes__loss.png")
        for recipe in dict.fromkeys(entry.column[0] for entry in own):
            shown = [entry for entry in own if entry.column[0] == recipe]
            slug = shown[0].first["cell"].setting
            figure = draw_ranges(f"{model}, {recipe}", shown)
            write_figure(figure, out / f"{model}__ranges__{slug}.png")


def style(entry: Entry, own: list[Entry]) -> tuple[str, str]:
    """Colour and marker; a parameterization that has none of its own gets some by its name, a
    recipe by its place among those of `own`."""
    setting = entry.column[0]
    if entry.recipe is not None:
        place = sorted({other.column[0] for other in own}).index(setting)
        return f"C{place % 10}", _MARKERS[place % len(_MARKERS)]
    if setting in STYLES:
        return STYLES[setting]
    return _MORE_STYLES[sum(setting.encode()) % len(_MORE_STYLES)]


def _legend(own: list[Entry]) -> dict:
    what = "parameterization" if own[0].recipe is None else "recipe"
    return LEGEND | {"title": f"{what}, learning rate"}


def _line(axes: Axes, xs: Sequence, ys: Sequence, entry: Entry, own: list[Entry], **options):
    """Of lines that lie on each other the lower ones are wider, and no two have their markers in
    the same places."""
    every, place = max(1, len(xs) // MARKS), own.index(entry)
    color, marker = style(entry, own)
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
    lines = whole.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, **_legend(own))
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
        color, _ = style(entry, own)
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
    """Draws the losses of a model in two panels, those that may be far above the others in the left
    one: some parameterizations, and of recipes those whose loss ends in the upper half. Each point
    is the mean of some last training batches; returns how many."""
    window = loss_window(own)
    if own[0].recipe is None:
        far = [entry for entry in own if entry.column[0] in FAR_ABOVE]
    else:
        last = {id(entry): (entry.losses() or [math.inf])[-1] for entry in own}
        middle = sorted(last.values())[len(last) // 2]
        far = [entry for entry in own if last[id(entry)] > middle]
    near = [entry for entry in own if entry not in far]
    for axes, shown in zip(panels, (far, near), strict=True):
        if not shown:
            axes.set_visible(False)
            continue
        for entry in shown:
            means = loss_means(entry.losses(), window)
            _line(axes, range(window, window + len(means)), means, entry, own)
        title = ", ".join(dict.fromkeys(label(entry.column[0]) for entry in shown))
        if own[0].recipe is not None:
            title = f"that end {'higher' if shown is far else 'lower'}"
        axes.set(ylabel="cross-entropy loss (nats per token)", title=title)
        count_steps(axes)
        axes.legend(**_legend(own))
    return window


def loss_window(own: list[Entry]) -> int:
    """How many losses a mean is taken of: a twentieth of the steps."""
    return max(1, own[0].first["settings"]["steps"] // 20)


def loss_means(losses: list[float], window: int) -> list[float]:
    """Means of `window` losses each."""
    return [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]


# ---- ranges ------------------------------------------------------------------------------------


def draw_ranges(title: str, own: list[Entry]) -> Figure:
    """Of the first seed. Live ranges have factors, of which the smallest and largest are drawn."""
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
        f"{title}: both ends of some ranges (of live ones, their factors) as they learn"
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
    margin = high - low or abs(high)  # a live range starts with factors of one value
    axes.set_ylim(max(bottom, low - margin), min(top, high + margin))
    axes.set_title(name.removesuffix("_quantizer"), fontsize=9)
    count_steps(axes)
