"""Table 2 as Markdown and CSV, beside the paper's, and the table of the recipes."""

from __future__ import annotations

import statistics
from pathlib import Path

from asymq.experiments.common.files import as_csv, write
from asymq.experiments.common.words import count
from asymq.experiments.table2 import plots
from asymq.experiments.table2.protocol import PAPERS
from asymq.experiments.table2.results import (
    Entry,
    apart,
    by_model,
    entries,
    mean_and_spread,
    read_results,
)

# Published: float, then by parameterization and learning rate.
_PAPERS_COLUMNS = [(name, lr) for name in PAPERS for lr in (1e-2, 1e-3)]
PAPER = {
    "GPT2-small": (30.0, (2349.1, 50256.8, 28.6, 28.5, 25.6, 27.0)),
    "GPT2-XL": (18.4, (1712.5, 266.6, 17.5, 16.6, 15.5, 15.8)),
    "OPT-125M": (31.8, (4825.7, 746.1, 2036.1, 52.5, 30.6, 31.6)),
    "OPT-1.3B": (16.8, (3192.3, 16.9, 17.1, 16.6, 16.5, 14.9)),
}
_FIELDS = (
    *("model", "parameterization", "lr", "steps", "seed", "fp_ppl", "calibrated_ppl"),
    *("final_ppl", "collapsed", "seconds_per_step", "peak_gib"),
)


def report(out: Path) -> None:
    """Writes table.md, table.csv and the plots of all results in a folder, and prints the table."""
    found = read_results(out)
    if not found:
        return
    table = markdown(found)
    write(out / "table.csv", table_csv(found))
    plots.plot(found, out)
    write(out / "table.md", table)
    print(table)
    print(f"wrote {out}/table.md, table.csv, plots and a JSON file per cell")


def markdown(found: list[dict]) -> str:
    """The tables of the paper's setting and of the recipes, as far as there are results."""
    papers, recipes = apart(found)
    tables = [papers_table(papers)] if papers else []
    return "\n".join([*tables, *([recipes_table(recipes)] if recipes else [])])


def papers_table(found: list[dict]) -> str:
    """The table, the paper's below, and under which conditions it was made."""
    models = by_model(found)
    titles: dict[tuple[str, float], str] = {}  # of the columns
    for entry in sorted(entries(found), key=Entry.place):
        titles.setdefault(entry.column, entry.title)
    lines = [
        f"| model | float | calibrated | {' | '.join(titles.values())} |",
        "|" + "---|" * (3 + len(titles)),
    ]
    for model, own in models.items():
        final = {entry.column: _over_seeds(entry, "final_ppl") for entry in own}
        calibrated = _over_seeds(own[0], "calibrated_ppl")
        cells = [calibrated, *(final.get(column, "") for column in titles)]
        lines.append(_line(model, _figure(own[0].first["fp_ppl"]), *cells))
    for model, (plain, values) in PAPER.items():
        published = dict(zip(_PAPERS_COLUMNS, values, strict=True))
        cells = ["", *(_figure(published.get(column)) for column in titles)]
        lines.append(_line(f"paper: {model}", _figure(plain), *cells))
    conditions = [line for model, own in models.items() for line in _conditions(model, own)]
    head = "Perplexity on the test text; the paper's figures are for WikiText-2."
    return "\n".join([*lines, "", head, "", *conditions]) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.2f}" if value < 1000 else f"{value:.1f}"


def _over_seeds(entry: Entry, key: str) -> str:
    mean, spread = mean_and_spread([result[key] for result in entry.results])
    return _figure(mean) + ("" if spread is None else f" ± {_figure(spread)}")


def _conditions(model: str, own: list[Entry]) -> list[str]:
    results = [result for entry in own for result in entry.results]
    one, s = results[0], results[0]["settings"]
    seconds = statistics.median_high(result["seconds_per_step"] for result in results)
    return [
        f"- {model}: {_how(own)}; {seconds * 1e3:.0f} ms a step on {one['machine']}",
        f"- {model}: of {one['ranges']} ranges collapsed (scale at most {s['eps']:g}): "
        f"{_all_collapsed(own)}",
        f"- {model}: {_versions(one)}",
    ]


def _how(own: list[Entry]) -> str:
    results = [result for entry in own for result in entry.results]
    s = results[0]["settings"]
    seeds = sorted({result["seed"] for result in results})
    of_seeds = f"seed {seeds[0]}"
    if len(seeds) > 1:
        of_seeds = f"mean ± standard deviation of seeds {', '.join(map(str, seeds))}"
    return (
        f"{s['steps']} steps of Adam, batch {s['batch']}, context {s['context']}, "
        f"{of_seeds}; learned from {s['train_text']}, evaluated on {s['test_text']} "
        f"({s['perplexity']})"
    )


def _all_collapsed(own: list[Entry]) -> str:
    collapsed = [
        f"{entry.title} {' / '.join(str(_collapsed(result)) for result in entry.results)}"
        for entry in own
        if any(map(_collapsed, entry.results))
    ]
    return ", ".join(collapsed) or "none"


def _versions(result: dict) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    return f"{versions}; commit {result['commit'] or 'unknown'}"


# ---- recipes -----------------------------------------------------------------------------------


def recipes_table(found: list[dict]) -> str:
    """A row for each recipe and learning rate: perplexity as calibrated, after the last step, and
    the lowest that was seen; the float model's beside them."""
    lines = [
        "| model | recipe | learning rate | float | calibrated | learned | lowest | ms a step |",
        "|" + "---|" * 8,
    ]
    notes = []
    for model, own in by_model(found).items():
        for entry in own:
            recipe, _ = entry.column
            seconds = statistics.median_high(r["seconds_per_step"] for r in entry.results)
            cells = [_figure(entry.first["fp_ppl"]), _over_seeds(entry, "calibrated_ppl")]
            cells += [_over_seeds(entry, "final_ppl"), _lowest(entry), f"{seconds * 1e3:.0f}"]
            lines.append(_line(model, recipe, entry.lr, *cells))
        one = own[0].first
        notes += [
            f"- {model}: {_how(own)}; on {one['machine']}",
            f"- {model}: collapsed ranges: {_all_collapsed(own)}",
            f"- {model}: {_versions(one)}",
        ]
    head = (
        "Perplexity on the test text; the weights are frozen, the factors of the ranges learn "
        "(beta/gamma)."
    )
    return "\n".join([*lines, "", head, "", *notes]) + "\n"


def _lowest(entry: Entry) -> str:
    """Of the means over seeds, with its step."""
    means = {step: statistics.fmean(values) for step, values in entry.perplexities().items()}
    if not means:
        return ""
    step = min(means, key=lambda step: means[step])
    return f"{_figure(means[step])} ({'calibrated' if step == 0 else count(step, 'step')})"


def _collapsed(result: dict) -> int:
    return sum(result["collapsed"].values())


def table_csv(found: list[dict]) -> str:
    """A line per result, which also says how many seeds its cell has, their mean and spread."""
    rows = []
    names: tuple[str, ...] = _FIELDS
    if any(result.get("recipe") for result in found):
        names = ("model", "recipe", *_FIELDS[1:])
    for entry in entries(found):
        mean, spread = mean_and_spread([result["final_ppl"] for result in entry.results])
        for result in entry.results:
            values = result | {"collapsed": _collapsed(result)}
            rows.append([*map(values.get, names), len(entry.results), mean, spread])
    return as_csv((*names, "seeds", "mean_ppl", "spread_ppl"), rows)
