"""Fits laws to runs: fit.json, table.md and plots, a function of runs.csv alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asymq.experiments.common.files import BadInput, need_writable, write
from asymq.experiments.scaling_law import plots, table
from asymq.experiments.scaling_law.cells import FLOAT, PRECISIONS
from asymq.experiments.scaling_law.runs import Difference, Run, differences, read
from asymq.scaling_law import (
    PAPER_CHINCHILLA,
    PAPER_LAWS,
    Chinchilla,
    Fit,
    Law,
    bootstrap,
    fit_chinchilla,
    fit_law,
)

FIT = "fit.json"
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


def fit(path: Path, out: Path, enough: bool = True) -> None:
    """Writes what the runs of a file say into the folder `out`.

    BadInput, before anything is written: see `runs.read` and `runs.differences`; enough: the runs
    do not suffice for any law either, where otherwise the table says so.
    """
    runs = read(path)
    found = differences(path, runs)
    estimates: dict[str, Estimate] = {}
    missing: dict[str, str] = {}
    for precision in PRECISIONS:
        own = [run for run in found if run.precision == precision]
        if own:
            try:
                estimates[precision] = estimate(own)
            except ValueError as error:
                missing[precision] = str(error)
    chinchilla = None
    try:
        chinchilla = estimate_chinchilla([run for run in runs if run.precision == FLOAT])
    except ValueError as error:
        missing[FLOAT] = str(error)
    if enough and not (estimates and chinchilla):
        what = "; ".join(f"{name}: {why}" for name, why in missing.items()) or "no quantized runs"
        raise BadInput(f"{path}: too little for a law: {what}")
    need_writable(out)
    if estimates and chinchilla:
        write(out / FIT, json.dumps(_as_dict(estimates, chinchilla), indent=2) + "\n")
    else:
        # Of fewer runs than there were.
        (out / FIT).unlink(missing_ok=True)
    for precision, why in missing.items():
        print(f"no law of {precision}: {why}")
    text = table.markdown(found, estimates, chinchilla, missing)
    plots.plot(found, {name: e.law for name, e in estimates.items()}, out)
    write(out / table.TABLE, text)
    print(text)


def _as_dict(estimates: dict[str, Estimate], chinchilla: tuple[Chinchilla, Intervals]) -> dict:
    laws = {
        name: {
            **vars(e.law),
            "error": e.fit.error,
            "runs": e.fit.runs,
            "dropped": e.fit.dropped,
            "intervals": e.intervals,
        }
        for name, e in estimates.items()
    }
    constants, intervals = chinchilla
    return {**laws, "chinchilla": {**vars(constants), "intervals": intervals}}


def read_fit(folder: Path | None) -> tuple[dict[str, Law], Chinchilla]:
    """The laws of a folder by precision, or the paper's. BadInput: it has none."""
    if folder is None:
        return PAPER_LAWS, PAPER_CHINCHILLA
    path = folder / FIT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        constants = content.pop("chinchilla")
        laws = {name: Law(*_numbers(Law, values)) for name, values in content.items()}
        return laws, Chinchilla(*_numbers(Chinchilla, constants))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; `scaling_law.py fit` writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: is damaged; `scaling_law.py fit` writes it") from None


def _numbers(kind: type, values: dict) -> Iterable[float]:
    return [float(values[name]) for name in kind.__annotations__]
