"""What a folder of results holds: a JSON file per run, checkpoints of unfinished ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from asymq.experiments.common.files import BadInput
from asymq.experiments.transition_rate.protocol import METHODS

_NEEDED = {"score", "settings", "metric", "series"}


@dataclass(frozen=True)
class Cell:
    """A run. setting: bits of weights and activations, size of groups. value: of the method, as
    typed."""

    task: str
    setting: str
    optimizer: str
    method: str
    value: str
    seed: int

    @classmethod
    def named(cls, name: str) -> Cell:
        """The inverse of `name`. ValueError: it is no run's."""
        task, setting, optimizer, method, value, seed = name.rsplit("__", 5)
        if method not in METHODS or not seed.startswith("seed"):
            raise ValueError(name)
        return cls(task, setting, optimizer, method, value, int(seed.removeprefix("seed")))

    @property
    def name(self) -> str:
        return "__".join([*self.arm, self.value, f"seed{self.seed}"])

    @property
    def bits(self) -> int:
        return int(self.setting[1:].partition("a")[0])

    @property
    def arm(self) -> tuple[str, str, str, str]:
        return self.task, self.setting, self.optimizer, self.method

    def __str__(self) -> str:
        parts = (self.task, self.setting, self.optimizer, self.method, self.value)
        return " ".join([*parts, f"seed {self.seed}"])


def result_path(out: Path, cell: Cell) -> Path:
    return out / f"{cell.name}.json"


def checkpoint_path(out: Path, cell: Cell) -> Path:
    return out / "checkpoints" / f"{cell.name}.pt"


def lock_path(out: Path, cell: Cell) -> Path:
    return out / "checkpoints" / f"{cell.name}.lock"


def read_results(out: Path) -> list[dict]:
    """BadInput: one is damaged."""
    found = []
    for path in sorted(out.glob("*__*__*__seed*.json")):
        if path.name.startswith("."):
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if missing := _NEEDED - {*result}:
                raise ValueError(missing)
            found.append({**result, "cell": Cell.named(path.stem)})
        except (OSError, ValueError, TypeError):
            raise BadInput(f"{path}: is not a result; delete it and it is run again") from None
    return found


# ---- all seeds of a method and value -----------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line of the table: the results of all seeds."""

    results: tuple[dict, ...]

    @property
    def first(self) -> dict:
        return self.results[0]

    @property
    def cell(self) -> Cell:
        return self.first["cell"]

    @property
    def title(self) -> str:
        return f"{self.cell.method} {self.cell.value}"

    @property
    def scores(self) -> dict[int, float | None]:
        """By seed; None: the loss was not finite."""
        return {result["cell"].seed: result["score"] for result in self.results}

    def mean(self) -> float | None:
        scores = [score for score in self.scores.values() if score is not None]
        return sum(scores) / len(scores) if len(scores) == len(self.results) else None

    def series(self, name: str) -> list[float]:
        """The mean of all seeds, as far as all have it."""
        rows = [result["series"].get(name, []) for result in self.results]
        return [sum(values) / len(values) for values in zip(*rows, strict=False)]


def groups(found: list[dict]) -> dict[tuple[str, str, str], list[Entry]]:
    """Entries by task, setting and optimizer, methods in their order, values from small on."""
    cells: dict[tuple, list[dict]] = {}
    for result in sorted(found, key=lambda result: result["cell"].seed):
        cell = result["cell"]
        cells.setdefault((*cell.arm, float(cell.value)), []).append(result)
    made: dict[tuple[str, str, str], list[Entry]] = {}
    methods = list(METHODS)
    for key in sorted(cells, key=lambda key: (*key[:3], methods.index(key[3]), key[4])):
        made.setdefault(key[:3], []).append(Entry(tuple(cells[key])))
    return made


def best_plain(
    entries: list[Entry], higher_is_better: bool, plain: tuple[str, ...]
) -> Entry | None:
    """The best mean score of the methods `plain`."""
    known = [e for e in entries if e.cell.method in plain and e.mean() is not None]
    sign = 1 if higher_is_better else -1
    return max(known, key=lambda e: sign * (e.mean() or 0.0), default=None)
