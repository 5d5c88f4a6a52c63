"""What a folder of the study holds: a JSON file per cell."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from asymq.experiments.common.files import BadInput
from asymq.experiments.study.setting import Cell, Setting

_NEEDED = {"kl", "perplexity", "float_perplexity", "seconds_per_step", "settings"}


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
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if missing := _NEEDED - {*result}:
                raise ValueError(missing)
            found[Cell.named(path.stem)] = result
        except (OSError, ValueError, TypeError):
            raise BadInput(f"{path}: is not a result; delete it and it is run again") from None
    return found


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
        return self.mean("kl") or float("inf") if self.finite else float("inf")


def entry_of(found: dict[Cell, dict], model: str, setting: Setting) -> Entry | None:
    """None: it was not run."""
    by_seed = {
        cell.seed: result
        for cell, result in found.items()
        if cell.model == model and cell.setting == setting
    }
    return Entry(setting, dict(sorted(by_seed.items()))) if by_seed else None
