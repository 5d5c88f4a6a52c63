"""claims.md: a section for every figure and table, each replaced alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asymq.experiments.common.files import write
from asymq.experiments.common.provenance import header
from asymq.experiments.common.verdict import Verdict
from asymq.experiments.figures.definitions import TITLES

_INTRODUCTION = """\
# The paper's claims, checked

Written by `scripts/figures.py`; every verdict is computed from the runs. A run converges if its
error (mean squared) is below 1.1 times that of the best range, which is searched by brute force,
and its ends moved by less than 2 % of the span over the last 1,000 steps. Oscillation is peak to
peak over the last 500 steps, of the end that oscillates more. Ends and errors are those of the last
step, means over the seeds. The paper's straight-through gradients do not vanish at the best range:
a converged run at 3 bits stays 1 to 3 % above its error.
"""


def write_claims(
    out: Path, name: str, lines: list[str], verdicts: list[Verdict], more: Sequence[str] = ()
) -> None:
    """Replaces the section of a figure in claims.md, the others stay."""
    path = out / "claims.md"
    sections = {}
    if path.exists():
        _, *parts = path.read_text(encoding="utf-8").split("\n## ")
        titles = {title: key for key, title in TITLES.items()}
        for part in parts:
            title, _, rest = part.partition("\n")
            if title in titles:
                sections[titles[title]] = rest.strip("\n")
    table = ["| claim | measured | verdict |", "|---|---|---|", *map(str, verdicts)]
    conditions = ["", f"({'; '.join(header('cpu', 'CPU'))})"]
    body = [*lines, *table, *(["", *more] if more else []), *conditions]
    sections[name] = "\n".join(body)
    text = [f"## {TITLES[key]}\n\n{sections[key]}\n" for key in TITLES if key in sections]
    write(path, "\n".join([_INTRODUCTION, *text]))
    print(TITLES[name])
    for verdict in verdicts:
        print(f"  {verdict.word}: {verdict.sentence}")
