"""The paper's Table 2: perplexity by model, parameterization and learning rate.

Every cell is a file of its own. What a folder of results has is not computed again, so that the
same command continues after an interruption.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

from asymq.experiments import text
from asymq.experiments.files import BadInput, write
from asymq.experiments.processes import Processes
from asymq.experiments.range_learning import (
    Cell,
    Protocol,
    Subject,
    checkpoint_path,
    label_of,
    need_same_settings,
    open_subject,
    read_checkpoint,
    read_result,
    result_path,
    run_cell,
)

# Published: float, then (parameterization, learning rate).
_COLUMNS = [(p, lr) for p in ("scale_offset", "min_max", "beta_gamma") for lr in (1e-2, 1e-3)]
PAPER = {
    "GPT2-small": (30.0, (2349.1, 50256.8, 28.6, 28.5, 25.6, 27.0)),
    "GPT2-XL": (18.4, (1712.5, 266.6, 17.5, 16.6, 15.5, 15.8)),
    "OPT-125M": (31.8, (4825.7, 746.1, 2036.1, 52.5, 30.6, 31.6)),
    "OPT-1.3B": (16.8, (3192.3, 16.9, 17.1, 16.6, 16.5, 14.9)),
}
ORDER = ("scale_offset", "min_max", "beta_gamma", "beta_gamma_sigmoid", "kscale_koffset")
# What a line tells enough about.
FAILURES = (BadInput, OSError, torch.OutOfMemoryError)
ENOUGH_SPACE = 100 << 20  # bytes; checkpoints hold ranges, not weights


@dataclass(frozen=True)
class Options:
    """What the command line says beside the protocol. lrs: as typed. devices: one process each, by
    default all GPUs; together: the processes of torchrun share every cell instead, with shard
    (FSDP2) the weights too."""

    models: list[str]
    parameterizations: list[str]
    lrs: list[str]
    out: Path
    data: str | None = None
    train_text: Path | None = None
    test_text: Path | None = None
    devices: list[str] | None = None
    shard: bool = False
    together: bool = False


def run(options: Options, protocol: Protocol) -> None:
    """Fills the table and writes table.md, table.csv and the plots into options.out.

    BadInput, before anything is written: something given cannot be used.
    """
    devices = _devices(options)
    processes = None
    if options.together:
        processes = Processes(options.devices[0] if options.devices else None, options.shard)
        if protocol.batch % processes.count:
            raise BadInput(
                f"--batch {protocol.batch} cannot be split evenly over {processes.count} processes"
            )
    subjects = open_subjects(options, protocol)
    cells = unfinished(options, subjects)
    _need_space(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    for leftover in options.out.rglob(".*.partial"):
        leftover.unlink(missing_ok=True)
    if processes is not None:
        _run_in_order(processes.share(cells), subjects, protocol, options.out, processes)
        processes.end()
        if not processes.first:
            return
    elif len(devices) == 1 or len(cells) < 2:
        _run_in_order(cells, subjects, protocol, options.out, Processes(devices[0]))
    else:
        _spread(cells, subjects, protocol, options.out, devices)
    report(options.out)
    checkpoints = options.out / "checkpoints"
    if checkpoints.exists() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


# ---- before any work ---------------------------------------------------------------------------


def _devices(options: Options) -> list[str]:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = [*gpus, "cpu"]
    for device in options.devices or ():
        if device not in known:
            raise BadInput(f"--devices {device}: there is no such device here, only {known}")
    return options.devices or gpus or ["cpu"]


def open_subjects(options: Options, protocol: Protocol) -> dict[str, Subject]:
    """The models by label."""
    if options.out.exists() and not options.out.is_dir():
        raise BadInput(f"--out {options.out}: is a file, not a folder")
    labels = [label_of(name) for name in options.models]
    if len(set(labels)) < len(labels):
        raise BadInput(f"--model: two models are called {max(labels, key=labels.count)}")
    train, test = text.read(options.data, options.train_text, options.test_text)
    return {
        label: open_subject(name, train, test, protocol)
        for label, name in zip(labels, options.models, strict=True)
    }


def unfinished(options: Options, subjects: dict[str, Subject]) -> list[Cell]:
    """The cells without a result, in the order of the table. BadInput: the folder has results or
    checkpoints that are damaged or of other settings."""
    for path in results(options.out):
        result = read_result(path)
        subject = subjects.get(result["cell"].model)
        if subject is not None:
            need_same_settings(path, result["settings"], subject)
            if not isinstance(result["fp_ppl"], str):
                subject.float_perplexity = result["fp_ppl"]
    cells = [
        Cell(label, parameterization, lr)
        for label in subjects
        for parameterization in options.parameterizations
        for lr in options.lrs
    ]
    cells = [cell for cell in cells if not result_path(options.out, cell).exists()]
    for cell in cells:
        checkpoint = read_checkpoint(options.out, cell)
        if checkpoint is not None:
            path = checkpoint_path(options.out, cell)
            need_same_settings(path, checkpoint["settings"], subjects[cell.model])
            subjects[cell.model].float_perplexity = checkpoint["state"]["fp_ppl"]
    return cells


def _need_space(out: Path) -> None:
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < ENOUGH_SPACE:
        raise BadInput(
            f"--out {out}: {free >> 20} MB are free there, results and checkpoints need "
            f"{ENOUGH_SPACE >> 20}; choose another folder"
        )


# ---- the work ----------------------------------------------------------------------------------


def _run_in_order(
    cells: list[Cell],
    subjects: dict[str, Subject],
    protocol: Protocol,
    out: Path,
    processes: Processes,
) -> None:
    for number, cell in enumerate(cells, 1):
        with Progress(f"[{number}/{len(cells)}] {cell}", protocol.steps, processes.first) as bar:
            run_cell(cell, subjects[cell.model], protocol, out, processes, bar.show)


def _spread(
    cells: list[Cell],
    subjects: dict[str, Subject],
    protocol: Protocol,
    out: Path,
    devices: list[str],
) -> None:
    """One process per device; each takes the next cell when it has finished one."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for cell in cells:
        queue.put(cell)
    for _ in devices:
        queue.put(None)
    lock = context.RLock()
    workers = [
        context.Process(
            target=_work, args=(queue, lock, i, device, subjects, protocol, out), daemon=True
        )
        for i, device in enumerate(devices)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [d for d, worker in zip(devices, workers, strict=True) if worker.exitcode]
    if failed:
        raise BadInput(
            f"the work on {', '.join(failed)} stopped early (its message is above); the same "
            "command continues it"
        )


def _work(queue, lock, position, device, subjects, protocol, out) -> None:
    tqdm.set_lock(lock)
    processes = Processes(device)
    while (cell := queue.get()) is not None:
        with Progress(str(cell), protocol.steps, position=position) as bar:
            try:
                run_cell(cell, subjects[cell.model], protocol, out, processes, bar.show)
            except FAILURES as error:
                sys.exit(f"{cell}: {str(error).splitlines()[0]}")


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


# ---- the table ---------------------------------------------------------------------------------


def results(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("*__*__*.json") if not path.name.startswith("."))


def report(out: Path) -> None:
    """Writes table.md, table.csv and the plots of all results in a folder, and prints the table."""
    from asymq.experiments import table2_plots

    found = [read_result(path) for path in results(out)]
    table = markdown(found)
    write(out / "table.csv", as_csv(found))
    table2_plots.plot(found, out)
    write(out / "table.md", table)
    print(table)
    print(f"wrote {out}/table.md, table.csv, plots and a JSON file per cell")


def markdown(found: list[dict]) -> str:
    """The table, the paper's below, and under which conditions it was made."""
    columns = {}  # (parameterization, learning rate) to its title
    for result in sorted(found, key=order):
        columns.setdefault((result["parameterization"], result["lr"]), title(result))
    lines = [
        f"| model | float | calibrated | {' | '.join(columns.values())} |",
        "|" + "---|" * (3 + len(columns)),
    ]
    for model in dict.fromkeys(r["model"] for r in found):
        own = {(r["parameterization"], r["lr"]): r for r in found if r["model"] == model}
        one = next(iter(own.values()))
        cells = (own[column]["final_ppl"] if column in own else None for column in columns)
        lines.append(_row(model, one["fp_ppl"], one["calibrated_ppl"], *cells))
    for model, (plain, values) in PAPER.items():
        published = dict(zip(_COLUMNS, values, strict=True))
        lines.append(_row(f"paper: {model}", plain, None, *map(published.get, columns)))
    return "\n".join([*lines, "", *_conditions(found)]) + "\n"


def order(result: dict) -> tuple:
    """Sorts results as the table has its columns."""
    return ORDER.index(result["parameterization"]), -result["lr"]


def title(result: dict) -> str:
    """What tables and plots call a cell, such as "min/max 1e-2"."""
    return f"{result['parameterization'].replace('_', '/')} {result['cell'].lr}"


def _row(model: str, *values: float | str | None) -> str:
    def figure(value):
        if value is None or isinstance(value, str):
            return value or ""
        return f"{value:.2f}" if value < 1000 else f"{value:.1f}"

    return "| " + " | ".join([model, *map(figure, values)]) + " |"


def _conditions(found: list[dict]) -> list[str]:
    lines = ["Perplexity on the test text; the paper's figures are for WikiText-2.", ""]
    for model in dict.fromkeys(r["model"] for r in found):
        own = sorted((r for r in found if r["model"] == model), key=order)
        one, s = own[0], own[0]["settings"]
        seconds = sorted(r["seconds_per_step"] for r in own)[len(own) // 2]
        collapsed = [f"{title(r)} {sum(r['collapsed'].values())}" for r in own if r["collapsed"]]
        versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items() if v)
        lines += [
            f"- {model}: {s['steps']} steps of Adam, batch {s['batch']}, context {s['context']}, "
            f"seed {s['seed']}; learned from {s['train_text']}, evaluated on {s['test_text']} "
            f"({s['perplexity']}); {seconds * 1e3:.0f} ms a step on {one['machine']}",
            f"- {model}: of {one['ranges']} ranges collapsed (scale at most {s['eps']:g}): "
            f"{', '.join(collapsed) or 'none'}",
            f"- {model}: {versions}; commit {one['commit'] or 'unknown'}",
        ]
    return lines


def as_csv(found: list[dict]) -> str:
    fields = ("model", "parameterization", "lr", "steps", "seed", "fp_ppl", "calibrated_ppl")
    fields += ("final_ppl", "collapsed", "seconds_per_step", "peak_gib")
    file = io.StringIO()
    writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**r, "collapsed": sum(r["collapsed"].values())} for r in found)
    return file.getvalue()
