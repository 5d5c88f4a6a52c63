"""Fills Table 2: perplexity by model, parameterization and learning rate.

Every cell is a file of its own. What a folder of results has is not computed again, so that the
same command continues after an interruption, and commands that run at a time share the cells.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

from asymq.experiments.common import text
from asymq.experiments.common.command import flag
from asymq.experiments.common.files import BadInput, first_line, lock
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.recipes import Recipe
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

# What a line tells enough about.
FAILURES = (BadInput, OSError, torch.OutOfMemoryError)
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
                _remove_partial_files(self.out, cell)
                return True

            yield processes.share(take)


def _remove_partial_files(out: Path, cell: Cell) -> None:
    """What a killed process left half written."""
    for leftover in out.rglob(f".{cell.name}.*.partial"):
        leftover.unlink(missing_ok=True)


def run(options: Options, protocol: Protocol) -> None:
    """Fills the table and writes table.md, table.csv and the plots into options.out.

    BadInput, before anything is written: something given cannot be used.
    """
    devices = _devices(options)
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
        _run_in_order(cells, work, processes)
        processes.end()
        if not processes.first:
            return
    elif len(devices) == 1 or len(cells) < 2:
        _run_in_order(cells, work, Processes(devices[0]))
    else:
        _spread(cells, work, devices)
    left = [cell for cell in cells if not result_path(options.out, cell).exists()]
    if left:
        print(f"other commands are at {count(len(left), 'cell')}: {', '.join(map(str, left))}")
    report(options.out)
    with suppress(OSError):  # none are there, or other commands have theirs
        (options.out / "checkpoints").rmdir()


# ---- before any work ---------------------------------------------------------------------------


def _devices(options: Options) -> list[str]:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = [*gpus, "cpu"]
    for device in options.devices or ():
        if device not in known:
            raise BadInput(f"--devices {device}: there is no such device here, only {known}")
    return options.devices or gpus or ["cpu"]


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
        checkpoint = read_checkpoint(options.out, cell)
        if checkpoint is not None:
            path = checkpoint_path(options.out, cell)
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


# ---- the work ----------------------------------------------------------------------------------


def _run_in_order(cells: list[Cell], work: Work, processes: Processes) -> None:
    for number, cell in enumerate(cells, 1):
        work.run(cell, processes, f"[{number}/{len(cells)}] {cell}")


def _spread(cells: list[Cell], work: Work, devices: list[str]) -> None:
    """One process per device; each takes the next cell when it has finished one."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for cell in cells:
        queue.put(cell)
    for _ in devices:
        queue.put(None)
    bars = context.RLock()
    workers = [
        context.Process(target=_work_through, args=(queue, bars, i, device, work), daemon=True)
        for i, device in enumerate(devices)
    ]
    # Ctrl-C reaches all of them: this process alone answers, and ends the others when it does.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, interrupt)
    for worker in workers:
        worker.join()
    failed = [d for d, worker in zip(devices, workers, strict=True) if worker.exitcode]
    if failed:
        raise BadInput(
            f"the work on {', '.join(failed)} stopped early (its message is above); the same "
            "command continues it"
        )


def _work_through(queue, bars, position: int, device: str, work: Work) -> None:
    tqdm.set_lock(bars)
    processes = Processes(device)
    while (cell := queue.get()) is not None:
        try:
            work.run(cell, processes, str(cell), position)
        except FAILURES as error:
            sys.exit(f"{cell}: {first_line(error)}")


class Progress:
    """A bar with loss and time left; where the output is not a terminal, ten lines a cell."""

    def __init__(self, name: str, steps: int, shown: bool = True, position: int = 0):
        self._name, self._steps, self._shown = name, steps, shown
        self._terminal = sys.stderr.isatty()
        self._first: tuple[int, float] | None = None  # step of this run, and when it ended
        self._bar = tqdm(
            desc=name,
            total=steps,
            unit="step",
            position=position,
            disable=not (shown and self._terminal),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def show(self, step: int, loss: float) -> None:
        if self._first is None:
            self._first = step, time.perf_counter()
            # A continued cell starts there, not at 0: the time left is reckoned from it.
            self._bar.initial = self._bar.n = step - 1
        if self._terminal:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shown and step % max(1, self._steps // 10) == 0:
            first, began = self._first
            each = (time.perf_counter() - began) / max(1, step - first)
            left = tqdm.format_interval(each * (self._steps - step))
            print(
                f"{self._name}: step {step} of {self._steps}, loss {loss:.3f}, {left} left",
                file=sys.stderr,
            )
