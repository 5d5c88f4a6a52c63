"""Trains cells that a folder does not have yet.

What a cell gave is a row of runs.csv; one that was interrupted starts again. Commands with the same
folder share the cells.
"""

from __future__ import annotations

import gc
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from asymq.experiments.common.command import flag
from asymq.experiments.common.files import BadInput, lock, need_writable, write
from asymq.experiments.common.processes import Processes, processors
from asymq.experiments.common.provenance import machine
from asymq.experiments.common.spread import Progress, need_devices, run_all
from asymq.experiments.common.words import count
from asymq.experiments.scaling_law import tokens
from asymq.experiments.scaling_law.cells import Cell, Settings, need_trainable
from asymq.experiments.scaling_law.runs import RUNS, Trained, append, read
from asymq.experiments.scaling_law.training import Training

SETTINGS, LOG = "settings.json", "runs.log"


@dataclass
class Work:
    """What every process of a run knows."""

    data: str | None
    settings: Settings
    out: Path
    tokens: tokens.Tokens | None = None  # read by each process for itself

    def run(self, cell: Cell, processes: Processes, name: str, position: int = 0) -> None:
        """Trains a cell, unless another command is at it or has finished it."""
        with lock(self.out / "locks" / f"{cell.name}.lock") as taken:
            if not taken or cell in finished(self.out):
                return
            if self.tokens is None:
                self.tokens = tokens.read(self.data)
            device = processes.device
            if device.type == "cpu":
                # So small a model gains nothing by more, and sums are the same on any machine.
                torch.set_num_threads(1)
            gc.collect()  # models of earlier cells, which hold themselves in cycles
            training = Training(cell, self.settings, self.tokens, device)
            with Progress(name, training.steps, position=position) as bar:
                loss, held_out, seconds = training.run(bar.show)
            append(self.out, Trained.of(cell, training.steps, loss, held_out))
            line = (
                f"{cell}: {count(training.steps, 'step')} in {seconds:.1f} s, "
                f"{seconds / training.steps * 1e3:.2f} ms each, "
                f"{cell.tokens / seconds:,.0f} tokens/s, {device} ({machine(device.type)})\n"
            )
            with (self.out / LOG).open("a", encoding="utf-8") as log:
                log.write(line)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"tokens": None}


def train(
    cells: list[Cell], settings: Settings, out: Path, data: str | None, devices: list[str] | None
) -> None:
    """Trains the cells in their order.

    devices: by default all GPUs, else a process of one thread on each processor.
    BadInput, before anything is trained: something given cannot be used, or the folder is of other
    settings.
    """
    chosen = need_devices(devices) or ["cpu"] * processors()
    text = tokens.read(data)
    need_trainable(cells, settings, len(text.train))
    need_writable(out)
    kind = chosen[0].split(":")[0]
    depends_on = asdict(settings) | {
        "text": text.source,
        "text_sha256": text.sha256,
        "vocabulary": text.vocabulary,
        "held_out_tokens": len(text.held_out),
        "arithmetic": "bfloat16 autocast" if kind == "cuda" else "float32",
    }
    left = [cell for cell in cells if cell not in finished(out)]
    _need_same(out, depends_on, cells)
    write(out / SETTINGS, json.dumps(depends_on, indent=2) + "\n")
    work = Work(data, settings, out, text)
    run_all(left, work, chosen)
    other = [cell for cell in left if cell not in finished(out)]
    if other:
        print(f"other commands are at {count(len(other), 'cell')}: {', '.join(map(str, other))}")
    with suppress(OSError):  # other commands have theirs
        (out / "locks").rmdir()


def finished(out: Path) -> set[Cell]:
    """BadInput: the folder's runs.csv is damaged."""
    path = out / RUNS
    return {run.trained_cell for run in read(path, Trained)} if path.exists() else set()


def _need_same(out: Path, depends_on: dict, cells: list[Cell]) -> None:
    """BadInput: the folder's runs are of other settings, or one of `cells` would be a second one of
    the same size, tokens and group."""
    path = out / SETTINGS
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            different = [key for key in depends_on if found.get(key) != depends_on[key]]
        except (ValueError, AttributeError):
            raise BadInput(f"{path}: is damaged; remove it if it may be any") from None
        if different:
            key = different[0]
            name = flag(key) if key in asdict(Settings()) else key
            raise BadInput(
                f"{path}: its runs have {name} {found.get(key)!r}, this command {depends_on[key]!r}"
                "; choose another --out"
            )
    there = {cell.key: cell for cell in finished(out)}
    for cell in cells:
        if there.get(cell.key, cell) != cell:
            raise BadInput(
                f"{out / RUNS}: has {there[cell.key]}, and {cell} would be the same group once "
                "more; choose another --out"
            )
