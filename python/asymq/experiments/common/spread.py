"""Many cells of work on several devices, and how far they are."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any, Protocol

import torch
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

from asymq.experiments.common.files import BadInput, first_line
from asymq.experiments.common.processes import Processes

# What a line tells enough about.
FAILURES = (BadInput, OSError, torch.OutOfMemoryError)


class Work(Protocol):
    """What every process of a run knows, which can be pickled."""

    def run(self, cell: Any, processes: Processes, name: str, position: int = 0) -> None:
        """Runs a cell, unless another command is at it or has finished it. name: its bar's.
        position: the bar's line."""


def need_devices(given: list[str] | None) -> list[str]:
    """The devices `given`, or else all GPUs. BadInput: one is not there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = [*gpus, "cpu"]
    for device in given or ():
        if device not in known:
            raise BadInput(f"--devices {device}: there is no such device here, only {known}")
    return given or gpus


def run_all(cells: list, work: Work, devices: list[str]) -> None:
    """BadInput: a process failed, which has said why."""
    if len(devices) == 1 or len(cells) < 2:
        run_in_order(cells, work, Processes(devices[0]))
    else:
        spread(cells, work, devices[: len(cells)])


def run_in_order(cells: list, work: Work, processes: Processes) -> None:
    for number, cell in enumerate(cells, 1):
        work.run(cell, processes, f"[{number}/{len(cells)}] {cell}")


def spread(cells: list, work: Work, devices: list[str]) -> None:
    """One process per device; each takes the next cell when it has finished one. Those on the CPU
    share its threads."""
    threads = max(1, torch.get_num_threads() // devices.count("cpu")) if "cpu" in devices else 1
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for cell in cells:
        queue.put(cell)
    for _ in devices:
        queue.put(None)
    bars = context.RLock()
    workers = [
        context.Process(
            target=_work_through, args=(queue, bars, i, device, threads, work), daemon=True
        )
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


def _work_through(queue, bars, position: int, device: str, threads: int, work: Work) -> None:
    tqdm.set_lock(bars)
    if device == "cpu":
        torch.set_num_threads(threads)
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
