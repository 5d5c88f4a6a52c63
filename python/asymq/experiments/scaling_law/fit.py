"""Fits laws to runs: fit.json, table.md and plots, a function of runs.csv alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from asymq.experiments.common.files import BadInput, need_writable, write
from asymq.experiments.scaling_law import plots, table
from asymq.experiments.scaling_law.cells import FLOAT, PRECISIONS
from asymq.experiments.scaling_law.estimates import (
    Estimate,
    Intervals,
    estimate,
    estimate_chinchilla,
)
from asymq.experiments.scaling_law.runs import differences, read
from asymq.scaling_law import PAPER_CHINCHILLA, PAPER_LAWS, Chinchilla, Law

FIT = "fit.json"


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
