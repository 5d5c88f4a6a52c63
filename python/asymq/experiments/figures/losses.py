"""Figure 4, the losses of language models, from results of Table 2."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from asymq.experiments.common.files import BadInput, as_csv, write
from asymq.experiments.common.pictures import write_figure
from asymq.experiments.common.words import count
from asymq.experiments.figures import claims
from asymq.experiments.figures.definitions import FIGURE4
from asymq.experiments.figures.report import write_claims
from asymq.experiments.table2.plots import draw_losses, loss_means, loss_window, of_last
from asymq.experiments.table2.results import Entry, apart, by_model, read_results

CSV_POINTS = 150  # of a curve


def read(folder: Path) -> dict[str, list[Entry]]:
    """The results of a folder of scripts/table2.py, by model. BadInput: there are none."""
    papers, _ = apart(read_results(folder))
    found = [result for result in papers if result.get("loss")]
    if not found:
        raise BadInput(f"--table2 {folder}: has no results of scripts/table2.py")
    return by_model(found)


def write_figure4(models: dict[str, list[Entry]], out: Path) -> None:
    write_figure(draw(models), out / "figure4.png")
    rows, verdicts, lines = [], [], []
    for model, own in models.items():
        window, steps = loss_window(own), own[0].first["settings"]["steps"]
        for entry in own:
            means = loss_means(entry.losses(), window)
            for i in range(0, len(means), max(1, len(means) // CSV_POINTS)):
                rows.append((model, entry.column[0], entry.lr, i + window, f"{means[i]:.5g}"))
        lines.append(
            f"{model}: {count(steps, 'step')}; losses are means of "
            f"{count(window, 'training batch', 'es')}, in nats per token."
        )
        verdicts += claims.of_losses(model, _first_and_last(own, window), steps)
    write(out / "figure4.csv", as_csv(("model", "parameterization", "lr", "step", "loss"), rows))
    write_claims(out, "figure4", [*lines, ""], verdicts)


def _first_and_last(own: list[Entry], window: int) -> dict[tuple[str, str], tuple[float, float]]:
    """By parameterization and learning rate, the mean of the first and of the last `window` losses;
    the last is infinite where a loss was not finite."""
    found = {}
    for entry in own:
        means = loss_means(entry.losses(), window) or [math.inf]
        found[entry.column[0], entry.lr] = means[0], means[-1] if entry.finite else math.inf
    return found


def draw(models: dict[str, list[Entry]]) -> Figure:
    rows = len(models)
    figure, grid = plt.subplots(
        rows, 2, figsize=(11, 4.5 * rows), layout="constrained", squeeze=False
    )
    for panels, (model, own) in zip(grid, models.items(), strict=True):
        window = draw_losses(panels, own)
        for axes in panels:
            axes.set_title(f"{model}: {axes.get_title()}", fontsize=10)
    figure.suptitle(FIGURE4 + of_last(window))
    return figure
