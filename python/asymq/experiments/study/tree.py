"""The questions, the cells that answer each, and what follows from the answers.

Every question begins with the setting that the answers before it have led to, of its own recipe.
It compares candidates; a candidate is tried with one or several learning rates, and stands with the
one that diverges least from the float model (the KL divergence on held-out windows, seed 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from asymq.experiments.common.intervals import interval
from asymq.experiments.study.results import Entry, entry_of
from asymq.experiments.study.setting import FROZEN, LOSSES, LSQ, OPTIMIZERS, Cell, Setting

CLOSE = 0.05  # of the best: candidates nearer than this get more seeds
RULES = f"""\
- A candidate that was tried with several learning rates stands with the one of the least KL at
  seed 0. The KL divergence is that of held-out windows of the training text.
- Candidates whose KL at seed 0 is within {CLOSE:.0%} of the best one's get further seeds, as does
  that one; the best is then that of the least mean.
- A candidate ties with the best one where the 95 % interval of their difference, seed by seed
  (Student's t), holds zero, and with one seed where it is near. A question is decided where none
  ties.
- What goes on to the next question is the best candidate; where it ties with others, the default
  among them, of steps the fewest. Of the forms, beta/gamma and its links alone go on, which recipes
  have; steps and joint training are answered last and do not go on."""

Candidates = dict[str, list[Setting]]


@dataclass(frozen=True)
class Grid:
    """What is tried, beside what a question fixes itself. Numbers are as typed."""

    rates: tuple[str, ...] = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
    weight_rates: tuple[str, ...] = ("1e-6", "1e-5", "1e-4")
    steps: tuple[int, ...] = (50, 200, 1000)
    base_steps: int = 200
    seeds: int = 3


# Half decades from the rate that beta/gamma has: what θ', s and z are to a factor of about 1 (a
# sigmoid at 4 passes 1/55 of a step on), and for SGD, whose steps are the gradients, a wide net.
# Where all of them diverge the first stands.
_SHIFTS = {
    "beta_gamma": (0, -1, 1),
    "beta_gamma_sigmoid": (2, 3, 4),
    "beta_gamma_exp": (0, -1, 1),
    "beta_gamma_softplus": (0, -1, 1),
    "beta_gamma_clamp": (0, -1, 1),
    "min_max": (-4, -2, 0),
    "scale_offset": (-6, -4, -2),
    f"{LSQ} adam": (-6, -4, -2),
    f"{LSQ} sgd": (-4, -2, 0),
}


def shifted(rate: str, halves: int) -> str:
    """A learning rate some half decades above: on the grid 1e-3, 3e-3, 1e-2 of which it is, or near
    to which."""
    if halves == 0:
        return rate
    exponent, half = divmod(round(2 * math.log10(float(rate))) + halves, 2)
    return f"{3 if half else 1}e{exponent}"


def _rates(base: Setting, grid: Grid) -> Candidates:
    return {rate: [base.replace(rate=rate)] for rate in grid.rates}


def _around(base: Setting, shifts: tuple[int, ...], **changes) -> list[Setting]:
    return [base.replace(rate=shifted(base.rate, n), **changes) for n in shifts]


def _losses(base: Setting, grid: Grid) -> Candidates:
    return {loss: _around(base, (0, -1, 1), loss=loss) for loss in LOSSES}


def _forms(base: Setting, grid: Grid) -> Candidates:
    made = {}
    for label, shifts in _SHIFTS.items():
        form, _, optimizer = label.partition(" ")
        made[label] = _around(base, shifts, form=form, optimizer=optimizer or OPTIMIZERS[0])
    return made


def _calibrations(base: Setting, grid: Grid) -> Candidates:
    names = ("min_max", "percentile", "mse", "lsq")
    return {name: [base.replace(calibration=name)] for name in names}


def _steps(base: Setting, grid: Grid) -> Candidates:
    def shifts(steps: int) -> tuple[int, ...]:
        """The fewer the steps, the larger they may be."""
        return (0, 1) if steps < base.steps else (0, -1) if steps > base.steps else (0,)

    return {str(n): _around(base, shifts(n), steps=n) for n in sorted(grid.steps)}


def _joint(base: Setting, grid: Grid) -> Candidates:
    rates = (FROZEN, *grid.weight_rates)
    return {rate: [base.replace(weights=rate)] for rate in rates}


@dataclass(frozen=True)
class Stage:
    """A question. candidates: their settings, by label. default: is preferred among those that
    tie; None: the first of them. goes_on: whether the next question may begin with a label's."""

    name: str
    question: str
    candidates: Callable[[Setting, Grid], Candidates]
    default: str | None = None
    goes_on: Callable[[str], bool] = lambda label: True


STAGES = {
    stage.name: stage
    for stage in (
        Stage("rate", "Which learning rate of the ranges?", _rates, "1e-3"),
        Stage("loss", "Which loss?", _losses, "ce"),
        Stage(
            "form",
            "Which parameterization and link, or LSQ?",
            _forms,
            "beta_gamma",
            lambda label: label.startswith("beta_gamma"),
        ),
        Stage("calibration", "Which calibration?", _calibrations, "min_max"),
        Stage("steps", "How many steps?", _steps, None, lambda label: False),
        Stage("joint", "Do weights learn, too, and how fast?", _joint, FROZEN, lambda label: False),
    )
}


@dataclass(frozen=True)
class Outcome:
    """The answer of a recipe to a question. entries: of every candidate the one that it stands
    with, by label; tied: with the best, the best itself among them, nothing if all diverged."""

    stage: Stage
    entries: dict[str, Entry]
    best: str
    tied: tuple[str, ...]
    chosen: str

    @property
    def decided(self) -> bool:
        return len(self.tied) == 1

    @property
    def winner(self) -> Entry:
        return self.entries[self.chosen]

    def interval(self, label: str) -> tuple[float, float | None] | None:
        """The mean difference of KL to the best, and half its 95 % interval. None: no seed that
        both have."""
        differences = _paired(self.entries[label], self.entries[self.best])
        return interval(differences) if differences else None


def _paired(entry: Entry, best: Entry) -> list[float]:
    own, other = entry.values("kl"), best.values("kl")
    return [own[seed] - other[seed] for seed in own if seed in other]


def _ties(entry: Entry, best: Entry, near: bool) -> bool:
    differences = _paired(entry, best)
    if not entry.finite or len(differences) < 2:
        return entry.finite and near
    mean, half = interval(differences)
    return half is not None and mean <= half


def _first_kl(entry: Entry) -> float:
    return entry.values("kl").get(0, math.inf)


def close(entries: dict[str, Entry]) -> list[str]:
    """The candidates that are near to the best one at seed 0, that one among them; none if all
    diverged."""
    least = min(map(_first_kl, entries.values()))
    if least == math.inf:
        return []
    return [label for label, entry in entries.items() if _first_kl(entry) <= least * (1 + CLOSE)]


def answer(stage: Stage, entries: dict[str, Entry]) -> Outcome:
    near = close(entries)
    best = min(near or entries, key=lambda label: entries[label].kl)
    tied = tuple(
        label for label, e in entries.items() if near and _ties(e, entries[best], label in near)
    )
    preferred = stage.default or next(iter(tied), best)
    chosen = preferred if preferred in (tied or entries) else best
    return Outcome(stage, entries, best, tied, chosen)


@dataclass
class Walk:
    """How far a recipe has come: answers, and the cells of the question that is open."""

    outcomes: dict[str, Outcome]
    cells: dict[str, list[Cell]]  # of the stages that have begun
    last: Setting  # with which the next question begins

    def missing(self, found: dict[Cell, dict]) -> list[Cell]:
        return [cell for cells in self.cells.values() for cell in cells if cell not in found]


def walk(
    model: str, recipe: str, stages: Sequence[str], grid: Grid, found: dict[Cell, dict]
) -> Walk:
    """As far as the results lead, and the cells of the first question that they leave open."""
    at = Walk({}, {}, Setting(recipe, steps=grid.base_steps))
    entry = partial(entry_of, found, model)
    for name, stage in STAGES.items():
        if name not in stages:
            continue
        candidates = stage.candidates(at.last, grid)
        settings = list(dict.fromkeys(s for several in candidates.values() for s in several))
        at.cells[name] = [Cell(model, setting, 0) for setting in settings]
        if at.missing(found):
            return at
        standing = {}
        for label, several in candidates.items():
            tried = [e for e in map(entry, several) if e]
            standing[label] = min(tried, key=_first_kl)
        near = close(standing)
        if len(near) > 1:
            at.cells[name] += [
                Cell(model, standing[label].setting, seed)
                for label in near
                for seed in range(1, grid.seeds)
            ]
        if at.missing(found):
            return at
        at.outcomes[name] = answer(stage, standing)
        at.last = _next(at.outcomes[name], at.last)
    return at


def _next(outcome: Outcome, before: Setting) -> Setting:
    able = {label: e for label, e in outcome.entries.items() if outcome.stage.goes_on(label)}
    if not able:
        return before
    return able[answer(outcome.stage, able).chosen].setting
