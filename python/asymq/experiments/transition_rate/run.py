"""All runs of a command.

Every run is a file of its own. What a folder of results has is not computed again, so that the same
command continues after an interruption, and commands that run at a time share the runs.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from asymq.experiments.common.files import (
    BadInput,
    lock,
    need_writable,
    remove_partial_files,
)
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.spread import Progress, need_devices, run_all
from asymq.experiments.common.words import count
from asymq.experiments.table2.results import need_same_settings, read_checkpoint
from asymq.experiments.transition_rate.cell import run_cell, settings_of
from asymq.experiments.transition_rate.protocol import RATES, Protocol
from asymq.experiments.transition_rate.results import (
    Cell,
    checkpoint_path,
    lock_path,
    read_results,
    result_path,
)
from asymq.experiments.transition_rate.table import report
from asymq.experiments.transition_rate.tasks import Digits, Task, open_task


@dataclass(frozen=True)
class Options:
    """What the command line says beside the protocol. rates: empty, those of the optimizer.
    data: None, Python's help topics. Numbers that results are named after are as typed."""

    task: str
    out: Path
    optimizers: list[str]
    methods: list[str]
    bits: list[int]
    rates: list[str]
    factors: list[str]
    seeds: int
    data: str | None = None
    devices: list[str] | None = None
    checkpoint_every: int = 1000


@dataclass(frozen=True)
class Work:
    """What every process of a command knows."""

    task: Task
    out: Path
    checkpoint_every: int

    def run(self, cell: Cell, processes: Processes, name: str, position: int = 0) -> None:
        """Does a run, unless another command is at it or has finished it."""
        out, steps = self.out, self.task.protocol.steps
        assert steps is not None
        with lock(lock_path(out, cell)) as mine:
            if mine and not result_path(out, cell).exists():
                remove_partial_files(out, cell.name)
                with Progress(name, steps, position=position) as bar:
                    device = processes.device
                    run_cell(cell, self.task, out, device, self.checkpoint_every, bar.show)


def run(options: Options, protocol: Protocol) -> None:
    """Does the runs and writes table.md, table.csv and the plots into options.out.

    BadInput, before anything is run: something given cannot be used.
    """
    given = need_devices(options.devices)
    if options.out.exists() and not options.out.is_dir():
        raise BadInput(f"--out {options.out}: is a file, not a folder")
    found = read_results(options.out)
    task = open_task(options.task, protocol, options.data, options.out)
    cells = cells_of(options, task)
    _need_same_settings(options.out, cells, found, task)
    need_writable(options.out)
    left = [cell for cell in cells if not result_path(options.out, cell).exists()]
    if left:
        task.make(sorted({cell.seed for cell in left}))
        for bits in options.bits:
            task.quantized(bits, left[0].seed)
        # Steps of small models gain nothing by more threads than one.
        cores = (os.cpu_count() or 1) if isinstance(task, Digits) else 1
        devices = given or ["cpu"] * min(cores, len(left))
        run_all(left, Work(task, options.out, options.checkpoint_every), devices)
        left = [cell for cell in left if not result_path(options.out, cell).exists()]
    if left:
        print(f"other commands are at {count(len(left), 'run')}: {', '.join(map(str, left))}")
    report(options.out)
    with suppress(OSError):  # none are there, or other commands have theirs
        (options.out / "checkpoints").rmdir()


def cells_of(options: Options, task: Task) -> list[Cell]:
    """A seed after the other."""

    return [
        Cell(task.label, _setting(bits, task.protocol), optimizer, method, value, seed)
        for seed in range(options.seeds)
        for bits in options.bits
        for optimizer in options.optimizers
        for method in options.methods
        for value in (options.factors if method == "factor" else options.rates or RATES[optimizer])
    ]


def _setting(bits: int, protocol: Protocol) -> str:
    """Such as "w2a2" and "w3a8g32"."""
    group = "" if protocol.group is None else f"g{protocol.group}"
    return f"w{bits}a{protocol.activation_bits or bits}{group}"


def _need_same_settings(out: Path, cells: list[Cell], found: list[dict], task: Task) -> None:
    """BadInput: a result or a checkpoint is of other settings, or damaged."""
    settings = {cell.setting for cell in cells}
    for result in found:
        cell = result["cell"]
        if cell.task == task.label and cell.setting in settings:
            path = result_path(out, cell)
            need_same_settings(path, result["settings"], settings_of(cell, task))
    for cell in cells:
        path = checkpoint_path(out, cell)
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            need_same_settings(path, checkpoint["settings"], settings_of(cell, task))
