"""All cells of a study.

Every cell is a file of its own. What a folder of results has is not computed again, so that the
same command continues after an interruption, and commands that run at a time share the cells.
Before a question's cells run, plan.md states them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from asymq.experiments.common.files import (
    BadInput,
    lock,
    need_writable,
    remove_partial_files,
    write,
)
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.spread import Progress, need_devices, run_all
from asymq.experiments.common.words import count
from asymq.experiments.study.about import About, Tree, read_about, write_about
from asymq.experiments.study.cell import run_cell
from asymq.experiments.study.results import lock_path, read_results, result_path
from asymq.experiments.study.setting import Cell
from asymq.experiments.study.subject import Protocol, Study, open_study
from asymq.experiments.study.table import plan, report
from asymq.experiments.study.tree import STAGES, Grid
from asymq.experiments.table2.results import need_same_settings


@dataclass(frozen=True)
class Options:
    """What the command line says beside the protocol. recipes: as file names have them. processes:
    of each device."""

    model: str
    out: Path
    recipes: list[str]
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    grid: Grid = field(default_factory=Grid)
    data: str | None = None
    train_text: Path | None = None
    test_text: Path | None = None
    devices: list[str] | None = None
    processes: int = 1


@dataclass(frozen=True)
class Work:
    """What every process of a command knows."""

    study: Study
    out: Path

    def run(self, cell: Cell, processes: Processes, name: str, position: int = 0) -> None:
        """Runs a cell, unless another command is at it or has finished it."""
        with lock(lock_path(self.out, cell)) as mine:
            if mine and not result_path(self.out, cell).exists():
                remove_partial_files(self.out, cell.name)
                with Progress(name, cell.setting.steps, position=position) as bar:
                    run_cell(cell, self.study, self.out, processes, bar.show)


def run(options: Options, protocol: Protocol) -> None:
    """Answers question after question, and writes plan.md, table.md, runs.csv and a plot into
    options.out. BadInput, before anything is written: something given cannot be used."""
    devices = (need_devices(options.devices) or ["cpu"]) * options.processes
    study = _open(options, protocol)
    need_writable(options.out)
    with lock(options.out / "locks" / "study.lock", wait=True):
        about = _about(options, study)
        write_about(options.out, about)
    while cells := _state(options, about):
        run_all(cells, Work(study, options.out), devices)
        left = [cell for cell in cells if not result_path(options.out, cell).exists()]
        if left:
            print(f"other commands are at {count(len(left), 'cell')}; run this again after them")
            return
    with suppress(OSError):  # none are there, or other commands have theirs
        (options.out / "locks").rmdir()
    report(options.out)


def print_plan(options: Options, protocol: Protocol) -> None:
    """What is to be run, of which nothing is written. BadInput: something given cannot be used."""
    about = _about(options, _open(options, protocol))
    print(plan(about, read_results(options.out)))


def _open(options: Options, protocol: Protocol) -> Study:
    if options.out.exists() and not options.out.is_dir():
        raise BadInput(f"--out {options.out}: is a file, not a folder")
    found = read_results(options.out)
    study = open_study(
        options.model,
        options.data,
        options.train_text,
        options.test_text,
        protocol,
        options.recipes,
    )
    for cell, result in found.items():
        if cell.model != study.subject.label:
            raise BadInput(
                f"--out {options.out}: has results of {cell.model}; choose another for "
                f"{study.subject.label}"
            )
        need_same_settings(result_path(options.out, cell), result["settings"], study.settings)
    return study


def _about(options: Options, study: Study) -> About:
    """With the recipes of commands before."""
    before = read_about(options.out)
    own = dict.fromkeys(options.recipes, Tree(tuple(options.stages), options.grid))
    recipes = (before.recipes if before else {}) | own
    return About(study.subject.label, study.settings, recipes)


def _state(options: Options, about: About) -> list[Cell]:
    """The cells to run next, once plan.md states them."""
    found = read_results(options.out)
    write(options.out / "plan.md", plan(about, found))
    walks = about.walks(found)
    return [cell for recipe in options.recipes for cell in walks[recipe].missing(found)]
