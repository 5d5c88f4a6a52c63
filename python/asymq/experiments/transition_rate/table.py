"""The tables of a folder of results: scores, and how far they are from the best learning rate's."""

from __future__ import annotations

import statistics
from pathlib import Path

from asymq.experiments.common.files import as_csv, write
from asymq.experiments.common.intervals import interval
from asymq.experiments.transition_rate.plots import plot
from asymq.experiments.transition_rate.protocol import METHODS, PLAIN
from asymq.experiments.transition_rate.results import Entry, best_plain, groups, read_results

_CSV = ("task", "setting", "optimizer", "method", "value", "seed", "score", "first_score")


def report(out: Path) -> None:
    """Prints table.md after writing it, table.csv and the plots."""
    found = read_results(out)
    table = markdown(found)
    write(out / "table.md", table)
    write(out / "table.csv", table_csv(found))
    plot(found, out)
    print(table)


def markdown(found: list[dict]) -> str:
    """A table for each task, setting and optimizer."""
    parts = [_table(entries) for entries in groups(found).values()]
    methods = "\n".join(f"- {name}: {what}" for name, what in METHODS.items())
    head = (
        "Score after the last step: mean ± standard deviation over seeds. Difference: to the "
        "learning rate with the best mean (bold), seed by seed, with its 95 % interval (Student's "
        "t); what is chosen as the best of several is favoured by chance. Flips: share of codes "
        "that change in a step, over the last tenth."
    )
    return "\n\n".join([*parts, head, methods]) + "\n"


def _table(entries: list[Entry]) -> str:
    first = entries[0].first
    task, setting, optimizer, _ = entries[0].cell.arm
    best = best_plain(entries, first["higher_is_better"], PLAIN)
    lines = [
        f"## {task}, {setting}, {optimizer}",
        "",
        f"| method | {first['metric']} | difference | flips, % a step | held, % |",
        "|" + "---|" * 5,
    ]
    for entry in entries:
        difference = "" if best in (None, entry) else _interval(paired(entry, best))
        title = f"**{entry.title}**" if entry is best else entry.title
        held = entry.series("frozen")
        cells = [title, _spread(entry), difference, f"{100 * flips(entry):.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{100 * held[-1]:.1f}' if held else ''])} |")
    seconds = statistics.median(r["seconds_per_step"] for e in entries for r in e.results)
    versions = ", ".join(f"{name} {v}" for name, v in first["versions"].items() if v)
    begun = statistics.fmean(result["first_score"] for e in entries for result in e.results)
    return "\n".join(
        [
            *lines,
            "",
            f"{first['steps']:,} steps of {first['settings']['batch']}; as calibrated "
            f"{begun:.2f}; {seconds * 1e3:.1f} ms a step on {first['machine']}; {versions}; commit "
            f"{first['commit'] or 'unknown'}",
        ]
    )


def flips(entry: Entry) -> float:
    """The mean of the last tenth."""
    series = entry.series("flips")
    return statistics.fmean(series[-max(1, len(series) // 10) :])


def paired(entry: Entry, other: Entry) -> list[float]:
    """Differences of the seeds that both have."""
    return [
        score - base
        for seed, score in entry.scores.items()
        if score is not None and (base := other.scores.get(seed)) is not None
    ]


def _interval(differences: list[float]) -> str:
    if not differences:
        return ""
    mean, half = interval(differences)
    return f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def _spread(entry: Entry) -> str:
    scores = [score for score in entry.scores.values() if score is not None]
    lost = len(entry.scores) - len(scores)
    if lost:
        return f"{lost} of {len(entry.scores)} diverged"
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.3f}{spread}"


def table_csv(found: list[dict]) -> str:
    """A line per run, with its difference to the same seed of the best learning rate."""
    rows = []
    for entries in groups(found).values():
        best = best_plain(entries, entries[0].first["higher_is_better"], PLAIN)
        for entry in entries:
            for result in entry.results:
                cell, score = result["cell"], result["score"]
                base = None if best is None else best.scores.get(cell.seed)
                difference = None if score is None or base is None else score - base
                row = [*cell.arm, cell.value, cell.seed, score, result["first_score"]]
                rows.append([*row, difference, flips(Entry((result,))), result["seconds_per_step"]])
    return as_csv((*_CSV, "difference", "flips", "seconds_per_step"), rows)
