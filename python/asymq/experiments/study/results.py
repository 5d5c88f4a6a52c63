"""What a folder of the study holds: a JSON file per cell."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asymq.experiments.common.files import BadInput
from asymq.experiments.study.setting import Cell, Setting

MEASURED = ("kl", "perplexity")
WHEN = ("calibrated", "learned")
_NEEDED = {"float_perplexity", "seconds_per_step", "settings", "versions", "machine", "commit"}


def result_path(out: Path, cell: Cell) -> Path:
    return out / f"{cell.name}.json"


def lock_path(out: Path, cell: Cell) -> Path:
    return out / "locks" / f"{cell.name}.lock"


def read_results(out: Path) -> dict[Cell, dict]:
    """BadInput: one is damaged."""
    found = {}
    for path in sorted(out.glob("*__seed*.json")):
        if path.name.startswith("."):
            continue
        with reading(path):
            result = read_result(path, "collapsed")
            found[Cell.named(path.stem)] = result
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """BadInput where a result cannot be read as what it should be."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise BadInput(f"{path}: is not a result; delete it and it is run again") from None


def read_result(path: Path, *more: str) -> dict:
    """With all that reports read of any, and `more`. To be called in `reading`."""
    result = json.loads(path.read_text(encoding="utf-8"))
    missing = {*_NEEDED, *MEASURED, *more} - result.keys()
    missing |= {when for key in MEASURED for when in {*WHEN} - result[key].keys()}
    if missing:
        raise ValueError(missing)
    return result


@dataclass(frozen=True)
class Entry:
    """The results of all seeds of a setting, by seed."""

    setting: Setting
    by_seed: dict[int, dict]

    def values(self, key: str, when: str = "learned") -> dict[int, float]:
        """ "kl" or "perplexity" by seed, without those whose value is not finite."""
        found = {seed: result[key][when] for seed, result in self.by_seed.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def finite(self) -> bool:
        return len(self.values("kl")) == len(self.by_seed)

    def mean(self, key: str, when: str = "learned") -> float | None:
        """None: one of the seeds diverged."""
        found = self.values(key, when)
        return statistics.fmean(found.values()) if len(found) == len(self.by_seed) else None

    @property
    def kl(self) -> float:
        mean = self.mean("kl")
        return math.inf if mean is None else mean


def entry_of(found: dict[Cell, dict], model: str, setting: Setting) -> Entry | None:
    """None: it was not run."""
    by_seed = {
        cell.seed: result
        for cell, result in found.items()
        if cell.model == model and cell.setting == setting
    }
    return Entry(setting, dict(sorted(by_seed.items()))) if by_seed else None
