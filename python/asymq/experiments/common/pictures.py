"""What the pictures share."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from asymq.experiments.common.files import write


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all, and closes the figure."""
    write(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    plt.close(figure)


def count_steps(axes: Axes, which: str = "x") -> None:
    """Names the axis of training steps, which are whole numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text("training step")
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
