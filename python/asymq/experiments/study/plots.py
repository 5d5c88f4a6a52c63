"""KL and perplexity against the learning rate, a line for each recipe."""

from __future__ import annotations

from pathlib import Path

from asymq.experiments.common.pictures import plt, write_figure
from asymq.experiments.study.about import About
from asymq.experiments.study.setting import Cell


def plot(about: About, found: dict[Cell, dict], out: Path) -> None:
    """rates.png, where the question of the rate was answered."""
    outcomes = {
        recipe: at.outcomes["rate"]
        for recipe, at in about.walks(found).items()
        if "rate" in at.outcomes
    }
    if not outcomes:
        return
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key in zip(panels, ("kl", "perplexity"), strict=True):
        for recipe, outcome in outcomes.items():
            entries = [e for e in outcome.entries.values() if e.mean(key) is not None]
            entries.sort(key=lambda entry: float(entry.setting.rate))
            rates = [float(entry.setting.rate) for entry in entries]
            axes.plot(rates, [entry.mean(key) for entry in entries], "o-", label=recipe)
        axes.set(xscale="log", yscale="log", xlabel="learning rate of the ranges")
    panels[0].set_ylabel("KL to the float model, nats a token")
    panels[1].set_ylabel("perplexity of the test text")
    panels[0].legend()
    write_figure(figure, out / "rates.png")
