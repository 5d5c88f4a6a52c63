"""What is reported of a study: its plan, its answers, a line per run, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from asymq.experiments.common.files import BadInput, as_csv, write
from asymq.experiments.common.recipes import Recipe
from asymq.experiments.common.words import count
from asymq.experiments.study.about import About, read_about
from asymq.experiments.study.plots import plot
from asymq.experiments.study.results import MEASURED, WHEN, Entry, read_results
from asymq.experiments.study.setting import Cell
from asymq.experiments.study.tree import RULES, STAGES, Outcome, Walk

_SETTING = ("recipe", "form", "optimizer", "loss", "rate", "steps", "calibration", "weights")


def report(out: Path) -> None:
    """Writes table.md, runs.csv, plan.md and rates.png of what a folder has, and prints the table.
    BadInput: it has nothing."""
    about, found = read_about(out), read_results(out)
    if about is None or not found:
        raise BadInput(f"--out {out}: has no results of a study; `study.py run` makes them")
    table = markdown(about, found)
    write(out / "plan.md", plan(about, found))
    write(out / "runs.csv", runs_csv(found))
    write(out / "table.md", table)
    plot(about, found, out)
    print(table)


# ---- the plan ----------------------------------------------------------------------------------


def plan(about: About, found: dict[Cell, dict]) -> str:
    """Every question with its cells, as far as the results lead, and the rules."""
    settings = ", ".join(f"{k} {v}" for k, v in about.settings.items() if type(v) is int)
    lines = [f"# Plan: {about.model}", "", f"All cells: {settings}.", "", RULES]
    for recipe, at in about.walks(found).items():
        tree = about.recipes[recipe]
        lines += ["", f"## {title(recipe)}"]
        for name in (name for name in STAGES if name in tree.stages):
            lines += ["", *_stage_plan(name, at, found)]
    return "\n".join(lines) + "\n"


def _stage_plan(name: str, at: Walk, found: dict[Cell, dict]) -> list[str]:
    question = f"{name}: {STAGES[name].question}"
    if name not in at.cells:
        return [f"### {question}", "", "Its cells follow from the answers above."]
    cells = at.cells[name]
    done = sum(cell in found for cell in cells)
    head = f"### {question} {done} of {count(len(cells), 'cell')}"
    said = [f"- {'done: ' if cell in found else ''}{_plain(cell)}" for cell in cells]
    outcome = at.outcomes.get(name)
    return [head, "", *said, *(["", f"Goes on: {_chosen(outcome)}."] if outcome else [])]


def _plain(cell: Cell) -> str:
    _, _, rest = str(cell.setting).partition(": ")
    return f"{rest}, seed {cell.seed}"


def title(recipe: str) -> str:
    return str(Recipe.named(recipe) or recipe)


# ---- the answers -------------------------------------------------------------------------------


def markdown(about: About, found: dict[Cell, dict]) -> str:
    walks = about.walks(found)
    names = [name for name in STAGES if any(name in at.outcomes for at in walks.values())]
    lines = [
        f"# Settings of {about.model} by recipe",
        "",
        f"| recipe | {' | '.join(names)} |",
        "|" + "---|" * (1 + len(names)),
    ]
    for recipe, at in walks.items():
        cells = [_chosen(at.outcomes[n]) if n in at.outcomes else "" for n in names]
        lines.append(f"| {title(recipe)} | {' | '.join(cells)} |")
    lines += ["", RULES, "", *_conditions(about, found)]
    for recipe, at in walks.items():
        for outcome in at.outcomes.values():
            lines += ["", *_evidence(recipe, outcome)]
    return "\n".join(lines) + "\n"


def _chosen(outcome: Outcome) -> str:
    if outcome.decided:
        return outcome.chosen
    if not outcome.tied:
        return f"all diverged ({outcome.chosen})"
    return f"not decided between {', '.join(outcome.tied)} ({outcome.chosen})"


def _evidence(recipe: str, outcome: Outcome) -> list[str]:
    head = "| candidate | rate | seeds | KL calibrated | KL | difference | perplexity calibrated | "
    lines = [
        f"## {title(recipe)}: {outcome.stage.question}",
        "",
        head + "perplexity | collapsed | ms a step |",
        "|" + "---|" * 10,
    ]
    for label, entry in outcome.entries.items():
        first = next(iter(entry.by_seed.values()))
        name = f"**{label}**" if label == outcome.chosen else label
        cells = [name, entry.setting.rate, str(len(entry.by_seed))]
        cells += [
            _spread(entry, "kl", "calibrated"),
            _spread(entry, "kl"),
            _difference(outcome, label),
        ]
        cells += [_spread(entry, "perplexity", "calibrated"), _spread(entry, "perplexity")]
        cells += [str(first["collapsed"]), milliseconds(first)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"{_chosen(outcome)}."]


def milliseconds(result: dict) -> str:
    """Of a step; empty where none was timed."""
    seconds = result["seconds_per_step"]
    return "" if seconds is None else f"{seconds * 1e3:.0f}"


def each(values: Iterable) -> str:
    """Different ones, once."""
    return ", ".join(sorted({str(value) for value in values}))


def _difference(outcome: Outcome, label: str) -> str:
    found = None if label == outcome.best else outcome.interval(label)
    if found is None:
        return ""
    mean, half = found
    return f"{mean:+.3g}" + ("" if half is None else f" ± {half:.2g}")


def _spread(entry: Entry, key: str, when: str = "learned") -> str:
    values = list(entry.values(key, when).values())
    lost = len(entry.by_seed) - len(values)
    if lost:
        return f"{lost} of {len(entry.by_seed)} diverged"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def _conditions(about: About, found: dict[Cell, dict]) -> list[str]:
    """Of all results together."""
    results, s = list(found.values()), about.settings
    versions = each(f"{name} {v}" for r in results for name, v in r["versions"].items() if v)
    return [
        f"Float perplexity {results[0]['float_perplexity']:.2f}; "
        f"{s['batch']} windows of {s['context']} tokens a step; perplexity of {s['windows']} "
        f"windows of the test text, KL (nats a token) of {s['windows']} held-out windows of the "
        f"training text. {count(len(results), 'cell')} on "
        f"{each(r['machine'] for r in results)}; {versions}; "
        f"commit {each(r['commit'] or 'unknown' for r in results)}. Where several cells share a "
        "device, milliseconds a step are not a cell's own."
    ]


def runs_csv(found: dict[Cell, dict]) -> str:
    """A line per cell."""
    header = ["model", *_SETTING, "seed"]
    header += [f"{key}_{when}" for key in MEASURED for when in WHEN]
    header += ["float_perplexity", "collapsed", "seconds_per_step", "machine"]
    rows = []
    for cell, result in found.items():
        row = [cell.model, *(getattr(cell.setting, name) for name in _SETTING), cell.seed]
        row += [result[key][when] for key in MEASURED for when in WHEN]
        last = ("float_perplexity", "collapsed", "seconds_per_step", "machine")
        rows.append([*row, *(result[key] for key in last)])
    return as_csv(header, rows)
