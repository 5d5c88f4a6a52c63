"""Laws of runs, with 95 % intervals over resamples of their (N, D, seed) cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asymq.experiments.scaling_law.runs import Difference, Run
from asymq.scaling_law import Chinchilla, Fit, Law, bootstrap, fit_chinchilla, fit_law

Intervals = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """A fit, with 95 % intervals of its constants and error."""

    fit: Fit
    intervals: Intervals

    @property
    def law(self) -> Law:
        return self.fit.law


def columns(found: list[Difference]) -> tuple[np.ndarray, ...]:
    """N, D, G and δ."""
    rows = [(run.params, run.tokens, run.group, run.delta) for run in found]
    return tuple(np.array(rows, dtype=np.float64).reshape(-1, 4).T)


def law_of(found: list[Difference], tokens: bool = True, group: bool = True) -> Fit:
    """With tokens or group left out, where they shall have no exponent. ValueError: see
    `asymq.scaling_law.fit_law`."""
    n, d, g, delta = columns(found)
    return fit_law(n, d if tokens else None, g if group else None, delta)


def estimate(found: list[Difference], tokens: bool = True) -> Estimate:
    """ValueError: the runs, or resamples of them, do not vary enough."""

    def statistics(chosen: np.ndarray) -> dict[str, float]:
        fit = law_of([found[i] for i in chosen], tokens)
        return {**vars(fit.law), "error": fit.error}

    return Estimate(law_of(found, tokens), bootstrap([run.cell for run in found], statistics))


def estimate_chinchilla(runs: list[Run]) -> tuple[Chinchilla, Intervals]:
    """Of baselines. ValueError as above."""
    data = np.array([(run.params, run.tokens, run.loss) for run in runs]).reshape(-1, 3)
    fitted = fit_chinchilla(*data.T)

    def statistics(chosen: np.ndarray) -> dict[str, float]:
        return vars(fit_chinchilla(*data[chosen].T, start=fitted))

    return fitted, bootstrap([run.cell for run in runs], statistics)
