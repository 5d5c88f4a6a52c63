"""What a folder of results holds: a JSON file per cell, checkpoints of unfinished ones, ranges."""

from __future__ import annotations

import json
import math
import pickle
import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from asymq.experiments.common.files import BadInput
from asymq.experiments.common.recipes import Recipe
from asymq.experiments.table2.protocol import COLUMNS

DIVERGED, DIVERGED_ABOVE = "diverged", 1e6
_NEEDED = {"model", "parameterization", "lr", "fp_ppl", "final_ppl", "settings"}
_CHANGE_NO_RESULT = ("eval_every", "checkpoint_every")


@dataclass(frozen=True)
class Cell:
    """One training. model: its label. setting: a parameterization of the paper's setting, or the
    slug of a recipe. lr: as typed. seed: None is the protocol's, the others are named."""

    model: str
    setting: str
    lr: str
    seed: int | None = None

    @classmethod
    def named(cls, name: str) -> Cell:
        """The inverse of `name`. ValueError: it is no cell's."""
        rest, _, seed = name.rpartition("__seed")
        seeded = seed.isdecimal()
        model, setting, lr = (rest if seeded else name).rsplit("__", 2)
        float(lr)
        return cls(model, setting, lr, int(seed) if seeded else None)

    @property
    def key(self) -> tuple:
        """The same for all spellings of the learning rate."""
        return self.model, self.setting, float(self.lr), self.seed

    @property
    def recipe(self) -> Recipe | None:
        return Recipe.named(self.setting)

    @property
    def parameterization(self) -> str:
        return self.setting if self.recipe is None else "beta_gamma"

    @property
    def name(self) -> str:
        parts = [self.model, self.setting, self.lr]
        return "__".join(parts if self.seed is None else [*parts, f"seed{self.seed}"])

    def __str__(self) -> str:
        seed = "" if self.seed is None else f" seed {self.seed}"
        return f"{self.model} {self.recipe or self.setting} {self.lr}{seed}"


def checkpoint_path(out: Path, cell: Cell) -> Path:
    return out / "checkpoints" / f"{cell.name}.pt"


def lock_path(out: Path, cell: Cell) -> Path:
    return out / "checkpoints" / f"{cell.name}.lock"


def ranges_path(out: Path, cell: Cell) -> Path:
    """The learned ranges, by the names that the prepared model's state_dict has for them."""
    return out / "ranges" / f"{cell.name}.safetensors"


def result_path(out: Path, cell: Cell) -> Path:
    return out / f"{cell.name}.json"


def result_paths(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("*__*__*.json") if not path.name.startswith("."))


def read_result(path: Path) -> dict:
    """BadInput: it is damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if missing := _NEEDED - {*result}:
            raise ValueError(missing)
        return {**result, "cell": Cell.named(path.stem)}
    except (OSError, ValueError, TypeError):
        raise BadInput(f"{path}: is not a result; delete it and the cell is run again") from None


def read_results(out: Path) -> list[dict]:
    """BadInput: one is damaged, or two are of one cell."""
    found: dict[tuple, dict] = {}
    for path in result_paths(out):
        result = read_result(path)
        first = found.setdefault(result["cell"].key, result)
        if first is not result:
            raise BadInput(f"{path}: is of the same cell as {first['cell'].name}.json; delete one")
    return [*found.values()]


def as_found(out: Path, cells: list[Cell]) -> list[Cell]:
    """The cells with the learning rates spelled as the folder has them already; each once."""
    known: dict[tuple, Cell] = {}
    for path in (*result_paths(out), *(out / "checkpoints").glob("*__*__*.*")):
        if path.suffix in (".json", ".pt", ".lock"):
            with suppress(ValueError):
                cell = Cell.named(path.stem)
                known[cell.key] = cell
    return list(dict.fromkeys(known.setdefault(cell.key, cell) for cell in cells))


def read_checkpoint(path: Path) -> dict | None:
    """What an unfinished cell left; None if there is nothing. BadInput: it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError):
        raise BadInput(
            f"{path}: this checkpoint is incomplete; delete it and the cell starts again"
        ) from None


def need_same_settings(path: Path, found: dict, settings: dict) -> None:
    """BadInput: the file `path`, made with the settings `found`, is of others than `settings`."""
    for key, value in settings.items():
        if key not in _CHANGE_NO_RESULT and found.get(key) != value:
            raise BadInput(
                f"{path}: was made with {key} {found.get(key)}, not {value}; choose another --out, "
                "or delete it"
            )


# ---- all seeds of a cell -----------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An entry of the table: the results of a model, setting and learning rate, one for every
    seed."""

    results: tuple[dict, ...]

    @property
    def first(self) -> dict:
        return self.results[0]

    @property
    def model(self) -> str:
        return self.first["model"]

    @property
    def recipe(self) -> str | None:
        return self.first.get("recipe")

    @property
    def column(self) -> tuple[str, float]:
        """Of the paper's setting the parameterization, else the recipe; and the learning rate."""
        return _setting(self.first), self.first["lr"]

    def place(self) -> tuple:
        """Sorts entries as the table has its columns."""
        return order(self.column[0]), -self.column[1]

    @property
    def lr(self) -> str:
        """As typed."""
        return self.first["cell"].lr

    @property
    def title(self) -> str:
        """What tables and plots call it, such as "min/max 1e-2" and "w8a8 1e-2"."""
        return f"{label(self.column[0])} {self.lr}"

    def perplexities(self) -> dict[int, list[float]]:
        """Of all seeds by step, where none is diverged."""
        common = set.intersection(*(set(result["ppl"]) for result in self.results))
        values = {int(s): [result["ppl"][s] for result in self.results] for s in common}
        return {s: v for s, v in sorted(values.items()) if DIVERGED not in v}

    def losses(self) -> list[float]:
        """By step, the mean of all seeds, up to where one is not finite."""
        losses = []
        for values in zip(*(result["loss"] for result in self.results), strict=False):
            if None in values:
                break
            losses.append(statistics.fmean(values))
        return losses

    @property
    def finite(self) -> bool:
        return all(None not in result["loss"] for result in self.results)


def entries(found: list[dict]) -> list[Entry]:
    """In the order of the table: models as found, then its columns."""
    groups: dict[tuple, list[dict]] = {}
    for result in sorted(found, key=lambda result: result.get("seed", 0)):
        key = result["model"], _setting(result), result["lr"]
        groups.setdefault(key, []).append(result)
    models = list(dict.fromkeys(result["model"] for result in found))

    made = [Entry(tuple(results)) for results in groups.values()]
    return sorted(made, key=lambda entry: (models.index(entry.model), entry.place()))


def _setting(result: dict) -> str:
    return result.get("recipe") or result["parameterization"]


def apart(found: list[dict]) -> tuple[list[dict], list[dict]]:
    """The results of the paper's setting, and those of recipes."""
    papers = [result for result in found if not result.get("recipe")]
    return papers, [result for result in found if result.get("recipe")]


def by_model(found: list[dict]) -> dict[str, list[Entry]]:
    models: dict[str, list[Entry]] = {}
    for entry in entries(found):
        models.setdefault(entry.model, []).append(entry)
    return models


def order(setting: str) -> tuple[int, str]:
    """Recipes, and parameterizations that this version does not know, come last."""
    place = COLUMNS.index(setting) if setting in COLUMNS else len(COLUMNS)
    return place, setting


def label(setting: str) -> str:
    return setting.replace("_", "/")


def mean_and_spread(values: list[float | str | None]) -> tuple[float | str | None, float | None]:
    """Mean and standard deviation (of a sample; None for one value); a word if any is one."""
    words = [value for value in values if isinstance(value, str)]
    if words:
        some = "" if len(words) == len(values) else f"{len(words)} of {len(values)} "
        return some + words[0], None
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        return None, None
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def perplexity_or_word(value: float) -> float | str:
    return value if value <= DIVERGED_ABOVE else DIVERGED  # NaN is not <= anything


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
