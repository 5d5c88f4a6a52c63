"""Results: runs.csv, a row for each training, and δ, the differences to the baselines."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from asymq.experiments.common.files import BadInput, as_csv, lock, write
from asymq.experiments.scaling_law.cells import FLOAT, PRECISIONS, TOKEN, Cell, Size

RUNS = "runs.csv"


@dataclass(frozen=True)
class Run:
    """precision: FLOAT is a baseline, which has no group. tokens, params, group: N, D and G. loss:
    in nats a token."""

    precision: str
    params: float
    tokens: float
    group: float | None
    seed: int
    loss: float

    @property
    def cell(self) -> tuple[float, float, int]:
        """What a baseline and its quantized runs share."""
        return self.params, self.tokens, self.seed

    @property
    def key(self) -> tuple:
        return self.precision, self.params, self.tokens, self.group, self.seed


@dataclass(frozen=True)
class Trained(Run):
    """What `run` knows beside: the rest of its cell, and the loss of held-out text."""

    held_out_loss: float
    steps: int
    width: int
    layers: int
    ranges: str  # TOKEN or "group"; nothing of a baseline

    @classmethod
    def of(cls, cell: Cell, steps: int, loss: float, held_out: float) -> Trained:
        kind = "" if cell.group is None else TOKEN if cell.group == TOKEN else "group"
        return cls(
            *(cell.precision, cell.size.params, cell.tokens, cell.elements, cell.seed, loss),
            *(held_out, steps, cell.size.width, cell.size.layers, kind),
        )

    @property
    def trained_cell(self) -> Cell:
        group = TOKEN if self.ranges == TOKEN else None if self.group is None else int(self.group)
        size = Size(self.width, self.layers)
        return Cell(size, int(self.tokens), self.precision, group, self.seed)


@dataclass(frozen=True)
class Difference(Run):
    """A quantized run with its δ."""

    delta: float


def read(path: Path, kind: type = Run) -> list:
    """The runs of a file in its order; kind: Run, or Trained, whose columns `run` writes.

    BadInput: it cannot be read, lacks a column, has a line that does not parse, or a run twice.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not a text in UTF-8") from None
    reader = csv.DictReader(io.StringIO(content))
    names = [field.name for field in fields(kind)]
    missing = [name for name in names if name not in (reader.fieldnames or ())]
    if missing:
        raise BadInput(f"{path}: has no column {missing[0]!r}; it needs {', '.join(names)}")
    found: dict[tuple, int] = {}
    runs = []
    for row in reader:
        line = reader.line_num
        try:
            run = kind(**{name: _PARSE[name](row[name]) for name in names})
        except (ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}: line {line} does not parse: {error}") from None
        if run.key in found:
            raise BadInput(f"{path}: line {line} is the same run as line {found[run.key]}")
        if (run.precision == FLOAT) != (run.group is None):
            wants = "no group" if run.precision == FLOAT else "a group"
            raise BadInput(f"{path}: line {line}: a {run.precision} run has {wants}")
        found[run.key] = line
        runs.append(run)
    return runs


def differences(path: Path, runs: list) -> list[Difference]:
    """δ of the quantized runs. BadInput: one has no baseline."""
    baselines = {run.cell: run.loss for run in runs if run.precision == FLOAT}
    found = []
    for run in runs:
        if run.precision == FLOAT:
            continue
        if run.cell not in baselines:
            raise BadInput(
                f"{path}: {run.precision} with params {run.params:.15g}, tokens {run.tokens:.15g}, "
                f"seed {run.seed} has no baseline: a {FLOAT} run of the same"
            )
        own = {field.name: getattr(run, field.name) for field in fields(Run)}
        found.append(Difference(**own, delta=run.loss - baselines[run.cell]))
    return found


def append(folder: Path, run: Trained) -> None:
    """Adds a row to the folder's runs.csv, whose rows are in one order whoever adds them."""
    path = folder / RUNS
    with lock(folder / "locks" / "runs.lock", wait=True):
        runs = read(path, Trained) if path.exists() else []
        runs = sorted([*runs, run], key=_order)
        write(path, as_csv([field.name for field in fields(Trained)], map(_row, runs)))


def _order(run: Trained) -> tuple:
    order = (FLOAT, *PRECISIONS).index(run.precision)
    return run.seed, run.params, run.tokens, order, run.group or 0, run.ranges


def _row(run: Trained) -> tuple:
    whole = replace(run, params=int(run.params), tokens=int(run.tokens))
    if run.group is not None:
        whole = replace(whole, group=int(run.group))
    return astuple(whole)


# ---- what a column holds -----------------------------------------------------------------------


def _above(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not least < value < math.inf:
            raise ValueError(f"must be above {least}, got {text!r}")
        return value

    return parse


def _precision(text: str) -> str:
    if text not in (FLOAT, *PRECISIONS):
        raise ValueError(f"unknown precision {text!r}; there are {', '.join((FLOAT, *PRECISIONS))}")
    return text


_PARSE: dict[str, Callable] = {
    "precision": _precision,
    "params": _above(0),
    "tokens": _above(0),
    "group": lambda text: _above(1)(text) if text.strip() else None,
    "seed": int,
    "loss": _above(0),
    "held_out_loss": _above(0),
    "steps": int,
    "width": int,
    "layers": int,
    "ranges": str,
}
