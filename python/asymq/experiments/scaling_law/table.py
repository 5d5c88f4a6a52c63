"""A sweep as Markdown: constants beside the paper's, claims, and every δ with its noise."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable

from asymq.experiments.common.words import count
from asymq.experiments.scaling_law import claims
from asymq.experiments.scaling_law.cells import FLOAT
from asymq.experiments.scaling_law.estimates import Estimate, Intervals, estimate
from asymq.experiments.scaling_law.runs import Difference
from asymq.scaling_law import PAPER_CHINCHILLA, PAPER_LAWS, Chinchilla, Law

TABLE = "table.md"
MANY_TOKENS = 17  # a parameter: the paper's least


def markdown(
    found: list[Difference],
    estimates: dict[str, Estimate],
    chinchilla: tuple[Chinchilla, Intervals] | None,
    missing: dict[str, str],
) -> str:
    verdicts = claims.judge(found, estimates)
    lines = ["# The scaling law of these runs", "", *_about(found), ""]
    for name, why in missing.items():
        lines += [f"There are no constants of {name}: {why}.", ""]
    if estimates:
        lines += _constants(found, estimates)
    if chinchilla:
        lines += _unquantized(*chinchilla)
    lines += ["## Claims", "", claims.summary(verdicts), ""]
    lines += ["| claim | measured [95 % interval] | |", "|---|---|---|", *map(str, verdicts), ""]
    lines += _all(found, {name: e.law for name, e in estimates.items()})
    return "\n".join(lines) + "\n"


def _about(found: list[Difference]) -> list[str]:
    if not found:
        return ["No quantized runs."]
    ratios = [run.tokens / run.params for run in found]
    cells = len({run.cell for run in found})
    lines = [
        f"δ is by how much the loss of {count(len(found), 'quantized run')} is above that of the "
        f"same model and seed in {FLOAT}, in nats a token. They are of "
        f"{count(cells, 'combination')} of size, tokens and seed, with {min(ratios):.3g} to "
        f"{max(ratios):.3g} tokens a parameter.",
        "",
        _noise(found),
    ]
    if claims.too_small(found):
        lines += [
            "",
            f"**These runs show no law** ({claims.too_small(found)}): they may claim that δ is "
            "positive where its interval says so, and nothing of how it varies.",
        ]
    return lines


def _noise(found: list[Difference]) -> str:
    spreads = [statistics.variance(d) for d in _by_place(found).values() if len(d) > 1]
    if not spreads:
        return "Every δ is of one seed: its noise is not known."
    noise = math.sqrt(statistics.fmean(spreads))
    return f"The noise of one δ, its spread over seeds, is {noise:.4f} (of {len(spreads)} cells)."


def _by_place(found: Iterable[Difference]) -> dict[tuple, list[float]]:
    """δ of all seeds."""
    places = defaultdict(list)
    for run in found:
        places[run.precision, run.params, run.tokens, run.group].append(run.delta)
    return places


def _constants(found: list[Difference], estimates: dict[str, Estimate]) -> list[str]:
    n, d = (_middle({getattr(run, name) for run in found}) for name in ("params", "tokens"))
    g = statistics.median_low(sorted({run.group or 2 for run in found}))
    lines = [
        "## Constants",
        "",
        "δ = k · D^γD · (log2 G)^γG / N^γN. k is known least of all: compare laws by their δ.",
        "",
        "| law | k | γN | γD | γG | mean error | runs (dropped) | "
        f"δ at N {n:.3g}, D {d:.3g}, G {g:g} |",
        "|" + "---|" * 8,
    ]
    for name, own in estimates.items():
        lines.append(_estimate(name, own, (n, d, g)))
        lines.append(_law(f"paper: {name}", PAPER_LAWS[name], (n, d, g)))
        lines += _variants(name, [run for run in found if run.precision == name], (n, d, g))
    return [*lines, ""]


def _variants(name: str, own: list[Difference], at: tuple) -> list[str]:
    """Without D, and of many tokens a parameter alone, where that can be fitted."""
    many = [run for run in own if run.tokens / run.params >= MANY_TOKENS]
    lines = []
    for what, runs, tokens in (("without D", own, False), (f"D/N ≥ {MANY_TOKENS}", many, True)):
        if runs and (tokens is False or len(runs) < len(own)):
            try:
                lines.append(_estimate(f"{name}, {what}", estimate(runs, tokens), at))
            except ValueError as error:
                lines.append(f"| {name}, {what} | not fitted: {error} |" + " |" * 6)
    return lines


def _estimate(name: str, own: Estimate, at: tuple) -> str:
    def shown(key: str, form: str) -> str:
        value = own.fit.error if key == "error" else getattr(own.law, key)
        low, high = own.intervals[key]
        return f"{value:{form}} [{low:{form}}, {high:{form}}]"

    cells = [shown("k", ".3g"), *(shown(f"gamma_{x}", ".3f") for x in "NDG"), shown("error", ".3f")]
    runs = f"{own.fit.runs} ({own.fit.dropped})"
    return f"| {name} | {' | '.join(cells)} | {runs} | {own.law.delta(*at):.4f} |"


def _law(name: str, law: Law, at: tuple) -> str:
    cells = [f"{law.k:g}", *(f"{getattr(law, f'gamma_{x}'):g}" for x in "NDG")]
    return f"| {name} | {' | '.join(cells)} | | | {law.delta(*at):.4f} |"


def _unquantized(fitted: Chinchilla, intervals: Intervals) -> list[str]:
    names = list(vars(fitted))
    cells = [
        f"{getattr(fitted, name):.4g} [{intervals[name][0]:.4g}, {intervals[name][1]:.4g}]"
        for name in names
    ]
    paper = [f"{getattr(PAPER_CHINCHILLA, name):g}" for name in names]
    return [
        f"The loss in {FLOAT} = A / N^α + B / D^β + E, with β = α:",
        "",
        "| | A | α | B | β | E |",
        "|---|---|---|---|---|---|",
        f"| these runs | {' | '.join(cells)} |",
        f"| paper, of other text | {' | '.join(paper)} |",
        "",
    ]


def _all(found: list[Difference], laws: dict[str, Law]) -> list[str]:
    lines = [
        "## Every δ",
        "",
        "Means of the seeds ± standard deviation; of one seed the noise is not known.",
        "",
        "| precision | params | tokens | tokens a parameter | group | δ | seeds | fitted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, n, d, g), deltas in sorted(_by_place(found).items()):
        spread = f"± {statistics.stdev(deltas):.4f}" if len(deltas) > 1 else "± ?"
        fitted = f"{laws[name].delta(n, d, g):.4f}" if name in laws else ""
        lines.append(
            f"| {name} | {n:,.0f} | {d:,.0f} | {d / n:.3g} | {g:g} | "
            f"{statistics.fmean(deltas):.4f} {spread} | {len(deltas)} | {fitted} |"
        )
    return lines


def _middle(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
