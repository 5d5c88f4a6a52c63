"""Files of results, whose first lines say where and with what they were made, and comparing a run
with one that is recorded."""

from __future__ import annotations

import csv
import math
from argparse import Namespace
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from asymq.experiments.common.files import BadInput, as_csv, write

SHOWN = 10  # missing rows


@dataclass(frozen=True)
class Recorded:
    """A file of results. rows: milliseconds by what was measured, as `key` has it."""

    path: Path
    head: list[str]
    rows: dict[tuple[str, ...], float]


def key(row) -> tuple[str, ...]:
    """What a row is of: its values before the milliseconds."""
    return astuple(row)[: _columns(type(row)).index("milliseconds")]


def _columns(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def read(args: Namespace, kind: type, setting: list[str]) -> Recorded | None:
    """The file of args.against, None if there is none. kind: the class of its rows; setting: what
    its first lines say beside machine, versions and date.

    BadInput: it is of another command, device or setting.
    """
    path = args.against
    if path is None:
        return None

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise BadInput(f"--against {path}: {what}")

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not a text"
        raise BadInput(f"--against {path}: {reason}") from None
    head = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    before = _columns(kind).index("milliseconds")
    columns = list(reader.fieldnames or ())[: before + 1]
    need(columns == _columns(kind)[: before + 1], f"is not of `benchmark.py {args.command}`")
    rows = list(reader)
    devices = {row["device"] for row in rows}
    need(devices == {args.device}, f"was measured on {', '.join(devices)}, this is {args.device}")
    need(head[3:] == setting, f"is of {', '.join(head[3:])}, this is {', '.join(setting)}")
    try:
        # One without a time was not measured.
        timed = [row for row in rows if row["milliseconds"] != ""]
        found = {tuple(row.values())[:before]: float(row["milliseconds"]) for row in timed}
    except (TypeError, ValueError):
        raise BadInput(f"--against {path}: has milliseconds that are no number") from None
    return Recorded(path, head, found)


def save(path: Path, head: list[str], rows: list, report: str, against: Recorded | None) -> None:
    """Writes path.csv and path.md, the report with the comparison below."""
    comments = "".join(f"# {line}\n" for line in head)
    columns = _columns(type(rows[0])) if rows else []
    write(path.with_name(f"{path.name}.csv"), comments + as_csv(columns, map(astuple, rows)))
    if against is not None:
        report = f"{report}\n{comparison(rows, against)}"
    write(path.with_name(f"{path.name}.md"), report)


def tell(path: Path, rows: list, against: Recorded | None) -> None:
    """Prints the comparison, and what `save` has written."""
    if against is not None:
        print(comparison(rows, against))
    print(f"wrote {path}.csv and {path}.md")


def comparison(rows: list, against: Recorded) -> str:
    """Every row now and then, and the rows that only one of both has."""
    now = {key(row): row.milliseconds for row in rows if row.milliseconds is not None}
    both = [what for what in now if what in against.rows]
    lines = [f"## Against {against.path.name}", "", *(f"- {line}" for line in against.head), ""]
    lines += ["| what | ms then | ms now | now / then |", "|---|---|---|---|"]
    for what in both:
        then = against.rows[what]
        ratio = now[what] / then if then else math.nan
        lines.append(f"| {_name(what)} | {then:.4g} | {now[what]:.4g} | {ratio:.3f} |")
    lines += _missing("Not in this run", [what for what in against.rows if what not in now])
    lines += _missing(f"Not in {against.path.name}", [w for w in now if w not in against.rows])
    return "\n".join(lines) + "\n"


def _missing(title: str, rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    more = [f"- and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return ["", f"{title}: {len(rows)}", "", *(f"- {_name(row)}" for row in rows[:SHOWN]), *more]


def _name(what: tuple[str, ...]) -> str:
    """Without the device, which is that of all rows."""
    return ", ".join(what[1:])
