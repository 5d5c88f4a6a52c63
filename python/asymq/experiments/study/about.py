"""What a folder of the study is about: its model, and what is asked of each recipe."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asymq.experiments.common.files import BadInput, write
from asymq.experiments.study.setting import Cell
from asymq.experiments.study.tree import STAGES, Grid, Walk, walk

FILE = "study.json"


@dataclass(frozen=True)
class Tree:
    """What is asked of a recipe."""

    stages: tuple[str, ...]
    grid: Grid


@dataclass(frozen=True)
class About:
    """model: its label. settings: what all results depend on. recipes: as file names have them."""

    model: str
    settings: dict
    recipes: dict[str, Tree]

    def walks(self, found: dict[Cell, dict]) -> dict[str, Walk]:
        """Of every recipe, as far as the results lead."""
        return {
            recipe: walk(self.model, recipe, tree.stages, tree.grid, found)
            for recipe, tree in self.recipes.items()
        }


def write_about(out: Path, about: About) -> None:
    write(out / FILE, json.dumps(asdict(about), indent=1))


def read_about(out: Path) -> About | None:
    """None: nothing was run there. BadInput: the file is damaged."""
    path = out / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        recipes = {recipe: _tree(tree) for recipe, tree in values["recipes"].items()}
        return About(values["model"], values["settings"], recipes)
    except (OSError, ValueError, TypeError, KeyError):
        raise BadInput(f"{path}: is damaged; delete it, and the same command makes it") from None


def _tree(values: dict) -> Tree:
    if unknown := set(values["stages"]) - set(STAGES):
        raise ValueError(unknown)
    grid: dict[str, Any] = values["grid"]
    lists = {name: tuple(value) for name, value in grid.items() if isinstance(value, list)}
    return Tree(tuple(values["stages"]), Grid(**grid | lists))
