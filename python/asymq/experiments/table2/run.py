"""Fills Table 2: perplexity by model, parameterization and learning rate.

Every cell is a file of its own. What a folder of results has is not computed again, so that the
same command continues after an interruption, and commands that run at a time share the cells.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from asymq.experiments.common import text
from asymq.experiments.common.command import flag
from asymq.experiments.common.files import BadInput, lock, remove_partial_files
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.recipes import Recipe
from asymq.experiments.common.spread import (
    Progress,
    need_devices,
    run_all,
    run_in_order,
)
from asymq.experiments.common.words import count
from asymq.experiments.table2.cell import run_cell, settings_of
from asymq.experiments.table2.protocol import (
    OF_PAPERS_QUANTIZERS,
    PAPERS,
    PAPERS_SETTING,
    Protocol,
)
from asymq.experiments.table2.results import (
    Cell,
    as_found,
    checkpoint_path,
    lock_path,
    need_same_settings,
    read_checkpoint,
    read_results,
    result_path,
)
from asymq.experiments.table2.subject import Subject, label_of, open_subject
from asymq.experiments.table2.table import report

ENOUGH_SPACE = 100 << 20  # bytes; checkpoints hold ranges, not weights


@dataclass(frozen=True)
class Options:
    """What the command line says beside the protocol. parameterizations: of the paper's setting,
    None: the paper's. lrs: as typed. recipes: PAPERS_SETTING among them is the paper's. seeds: how
    many, from the protocol's. devices: one process each, by default all GPUs; together: the
    processes of torchrun share every cell instead, with shard (FSDP2) the weights too."""

    models: list[str]
    parameterizations: list[str] | None
    lrs: list[str]
    out: Path
    recipes: tuple[Recipe | str, ...] = (PAPERS_SETTING,)
    seeds: int = 1
    data: str | None = None
    train_text: Path | None = None
    test_text: Path | None = None
    devices: list[str] | None = None
    shard: bool = False
    together: bool = False

    @property
    def settings(self) -> list[str]:
        """Of the cells."""
        papers = list(PAPERS if self.parameterizations is None else self.parameterizations)
        return [
            setting
            for recipe in self.recipes
            for setting in ([recipe.slug] if isinstance(recipe, Recipe) else papers)
        ]


@dataclass(frozen=True)
class Work:
    """What every process of a run knows."""

    subjects: dict[str, Subject]  # by label
    protocol: Protocol
    out: Path

    def run(self, cell: Cell, processes: Processes, name: str, position: int = 0) -> None:
        """Runs a cell, unless another command is at it or has finished it."""
        protocol = self.protocol if cell.seed is None else replace(self.protocol, seed=cell.seed)
        with self._taken(cell, processes) as taken:
            if taken:
                with Progress(name, protocol.steps, processes.first, position) as bar:
                    subject = self.subjects[cell.model]
                    run_cell(cell, subject, protocol, self.out, processes, bar.show)

    @contextmanager
    def _taken(self, cell: Cell, processes: Processes) -> Iterator[bool]:
        """Whether the cell is this command's now: its first process has the lock."""
        with ExitStack() as stack:

            def take() -> bool:
                locked = stack.enter_context(lock(lock_path(self.out, cell)))
                if not locked or result_path(self.out, cell).exists():
                    return False
                remove_partial_files(self.out, cell.name)
                return True

            yield processes.share(take)


def run(options: Options, protocol: Protocol) -> None:
    """Fills the table and writes table.md, table.csv and the plots into options.out.

    BadInput, before anything is written: something given cannot be used.
    """
    devices = need_devices(options.devices) or ["cpu"]
    _need_papers_setting(options, protocol)
    processes = None
    if options.together:
        processes = Processes(options.devices[0] if options.devices else None, options.shard)
        if protocol.batch % processes.count:
            raise BadInput(
                f"--batch {protocol.batch} cannot be split evenly over {processes.count} processes"
            )
    work = Work(open_subjects(options, protocol), protocol, options.out)

    def begin() -> list[Cell]:
        cells = unfinished(options, work)
        _need_space(options.out)
        options.out.mkdir(parents=True, exist_ok=True)
        return cells

    cells = begin() if processes is None else processes.share(begin)
    if processes is not None:
        run_in_order(cells, work, processes)
        processes.end()
        if not processes.first:
            return
    else:
        run_all(cells, work, devices)
    left = [cell for cell in cells if not result_path(options.out, cell).exists()]
    if left:
        print(f"other commands are at {count(len(left), 'cell')}: {', '.join(map(str, left))}")
    report(options.out)
    with suppress(OSError):  # none are there, or other commands have theirs
        (options.out / "checkpoints").rmdir()


# ---- before any work ---------------------------------------------------------------------------


def _need_papers_setting(options: Options, protocol: Protocol) -> None:
    """BadInput: without the paper's setting something is given that is of it alone."""
    if PAPERS_SETTING in options.recipes:
        return
    given = [] if options.parameterizations is None else ["parameterizations"]
    given += [
        name for name in OF_PAPERS_QUANTIZERS if getattr(protocol, name) != getattr(Protocol, name)
    ]
    if given:
        raise BadInput(
            f"{flag(given[0])}: is of the paper's setting (--recipe {PAPERS_SETTING}); the other "
            "recipes have their own"
        )


def open_subjects(options: Options, protocol: Protocol) -> dict[str, Subject]:
    """The models by label."""
    if options.out.exists() and not options.out.is_dir():
        raise BadInput(f"--out {options.out}: is a file, not a folder")
    labels = [label_of(name) for name in options.models]
    if len(set(labels)) < len(labels):
        raise BadInput(f"--model: two models are called {max(labels, key=labels.count)}")
    train, test = text.read(options.data, options.train_text, options.test_text)
    return {
        label: open_subject(name, train, test, protocol, options.settings)
        for label, name in zip(labels, options.models, strict=True)
    }


def unfinished(options: Options, work: Work) -> list[Cell]:
    """The cells without a result, in the order of the table, a seed after the other. BadInput: the
    folder has results or checkpoints that are damaged or of other settings."""
    for result in read_results(options.out):
        cell = result["cell"]
        _need_same(result_path(options.out, cell), result["settings"], cell, work)
    first = work.protocol.seed
    cells = [
        Cell(label, setting, lr, seed)
        for seed in (None, *range(first + 1, first + options.seeds))
        for label in work.subjects
        for setting in options.settings
        for lr in options.lrs
    ]
    cells = [
        cell for cell in as_found(options.out, cells) if not result_path(options.out, cell).exists()
    ]
    for cell in cells:
        path = checkpoint_path(options.out, cell)
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            _need_same(path, checkpoint["settings"], cell, work)
    return cells


def _need_same(path: Path, found: dict, cell: Cell, work: Work) -> None:
    subject = work.subjects.get(cell.model)
    if subject is not None:
        need_same_settings(path, found, settings_of(cell, subject))


def _need_space(out: Path) -> None:
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < ENOUGH_SPACE:
        raise BadInput(
            f"--out {out}: {free >> 20} MB are free there, results and checkpoints need "
            f"{ENOUGH_SPACE >> 20}; choose another folder"
        )
