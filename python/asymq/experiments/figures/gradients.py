"""The exact gradients of the operators: over x, and beside the paper's Tables 1 and 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import asymq
from asymq import QuantSpec
from asymq.experiments.common.files import as_csv
from asymq.experiments.common.verdict import Verdict

BITS, LOW, HIGH = 4, -1.1, 1.7
REGIONS = ("inside", "below", "above")
POINTS = (0.5, -2.1, 2.1)  # an x of each region
SAME = 1e-9  # cells further apart differ


class Learned(NamedTuple):
    """A parameterization at the range from LOW to HIGH. values: the operator's learned arguments,
    constants: those after them."""

    spec: QuantSpec
    values: tuple[float, ...]
    constants: tuple[float, ...] = ()


def _sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


_K = 2**BITS - 1
_S = (HIGH - LOW) / _K
_FACTORS, _LOGITS = (0.75, 0.625), (1.5, 0.5)

# By title.
LEARNED = {
    "scale/offset": Learned(QuantSpec(BITS, parameterization="scale_offset"), (_S, LOW / _S)),
    "min/max": Learned(QuantSpec(BITS, parameterization="min_max"), (LOW, HIGH)),
    "beta/gamma": Learned(QuantSpec(BITS), _FACTORS, (LOW / _FACTORS[0], HIGH / _FACTORS[1])),
    "beta/gamma with sigmoid": Learned(
        QuantSpec(BITS, sigmoid=True),
        _LOGITS,
        (LOW / _sigma(_LOGITS[0]), HIGH / _sigma(_LOGITS[1])),
    ),
    "kscale/koffset": Learned(
        QuantSpec(BITS, parameterization="kscale_koffset"), (_S * _K, LOW / _S / _K)
    ),
    "symmetric s": Learned(
        QuantSpec(BITS, symmetric=True, parameterization="scale_offset"), (2 * HIGH / _K,)
    ),
    "symmetric θmax": Learned(QuantSpec(BITS, symmetric=True, parameterization="min_max"), (HIGH,)),
    "symmetric γ": Learned(QuantSpec(BITS, symmetric=True), _FACTORS[1:], (HIGH / _FACTORS[1],)),
    "symmetric γ with sigmoid": Learned(
        QuantSpec(BITS, symmetric=True, sigmoid=True), _LOGITS[1:], (HIGH / _sigma(_LOGITS[1]),)
    ),
}

SYMBOLS = {
    "scale": "s",
    "offset": "z",
    "min": "θmin",
    "max": "θmax",
    "beta": "β",
    "gamma": "γ",
    "kscale": "s'",
    "koffset": "z'",
}


def exact(title: str, x: Tensor) -> dict[str, Tensor]:
    """x̂, its derivative by x ("x") and by every learned parameter at each x, from the operator's
    backward: every x is a row with a range of its own."""
    spec, values, constants = LEARNED[title]

    def column(value: float, learns: bool) -> Tensor:
        return torch.full((len(x), 1), value, dtype=torch.float64, requires_grad=learns)

    rows = x.double().reshape(-1, 1).requires_grad_()
    learned = [column(value, True) for value in values]
    options = {} if spec.link == "identity" else {"link": spec.link}
    function = getattr(asymq, spec.function)
    quantized = function(
        rows, *learned, *(column(v, False) for v in constants), bits=spec.bits, **options
    )
    gradients = torch.autograd.grad(quantized.sum(), [rows, *learned])
    names = ("x", *spec.learnable)
    found = {name: gradient[:, 0] for name, gradient in zip(names, gradients, strict=True)}
    return {"quantized": quantized.detach()[:, 0], **found}


# ---- the plots' data ---------------------------------------------------------------------------


def curves() -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """x over and beyond the range, and everything of `exact` by title."""
    x = torch.linspace(-2.6, 2.6, 1041, dtype=torch.float64)
    return x, {title: exact(title, x) for title in LEARNED}


def curves_csv(x: Tensor, found: dict[str, dict[str, Tensor]]) -> str:
    """Every fourth point of the plots."""
    columns = {"x": x}
    for title, values in found.items():
        for name, value in values.items():
            head = "x̂" if name == "quantized" else f"∂x̂/∂{SYMBOLS.get(name, name)}"
            columns[f"{title}: {head}"] = value
    points = torch.stack(list(columns.values()), dim=1)[::4].tolist()
    return as_csv(columns, ([f"{value:.5g}" for value in row] for row in points))


# ---- Tables 1 and 3 ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PrintedRow:
    """A row of a table. printed: its formulas inside, below and above as the paper has them;
    values: what these give. reasons: why a cell differs from the exact gradient, by region."""

    learned: str
    printed: tuple[str, ...]
    values: Callable[[SimpleNamespace], tuple[float, float, float]]
    reasons: dict[str, str]
    title: str


def _terms(title: str) -> SimpleNamespace:
    """The paper's symbols at the sample points. e = rint(x/s) - x/s inside, ζ = rint(z) - z."""
    spec, values, constants = LEARNED[title]
    tensors = [torch.tensor([v], dtype=torch.float64) for v in (*values, *constants)]
    scale, offset = asymq.effective_scale_offset(
        spec.parameterization,
        *tensors,
        bits=spec.bits,
        symmetric=spec.symmetric,
        link=spec.link,
    )
    s, k = scale.item(), spec.steps
    z = -(k - 1) / 2 if offset is None else offset.item()
    n = float(round(z))
    p = (k - 1) / 2 if offset is None else n + k
    ends = (None, *constants)[-2:] if constants else (None, None)
    u = POINTS[0] / s
    return SimpleNamespace(e=round(u) - u, s=s, n=n, p=p, k=k, ζ=n - z, θmin=ends[0], θmax=ends[1])


_THETA_MIN_BELOW = "-n/k + ζ/k + 1"
_THETA_MAX_BELOW = "n/k - ζ/k"
_MIN_BELOW = (
    "the derivative of s·rint(z) is -n/k + z/k + 1 = 1 - ζ/k; printed is ζ/k for z/k, which is "
    "right only with n = 0 and z of the other sign"
)
_MAX_BELOW = (
    "the derivative of s·rint(z) is n/k - z/k = ζ/k; printed is ζ/k for z/k, which is right only "
    "with n = 0 and z of the other sign"
)
_ABOVE = "ζ = rint(z) - z has the wrong sign, as if z were -θmin/s"
_NO_S = "the factor s is missing: a step of z moves x̂ = s·(x̄ + rint(z)) by s"
_NO_SIGMOID = "the factor σ(1 - σ) of the sigmoid is missing"
_AND_NO_SIGMOID = "; " + _NO_SIGMOID

TABLE1 = (
    PrintedRow("scale", ("e", "n", "p"), lambda t: (t.e, t.n, t.p), {}, "scale/offset"),
    PrintedRow(
        "offset",
        ("0", "1", "1"),
        lambda t: (0, 1, 1),
        {"below": _NO_S, "above": _NO_S},
        "scale/offset",
    ),
    PrintedRow(
        "min",
        ("-e/k", _THETA_MIN_BELOW, "ζ/k"),
        lambda t: (-t.e / t.k, -t.n / t.k + t.ζ / t.k + 1, t.ζ / t.k),
        {"below": _MIN_BELOW, "above": _ABOVE},
        "min/max",
    ),
    PrintedRow(
        "max",
        ("e/k", _THETA_MAX_BELOW, "-ζ/k + 1"),
        lambda t: (t.e / t.k, t.n / t.k - t.ζ / t.k, -t.ζ / t.k + 1),
        {"below": _MAX_BELOW, "above": _ABOVE},
        "min/max",
    ),
    *(
        PrintedRow(
            learned,
            tuple(f"{end}·({cell})" for cell in cells),
            values,
            {
                "inside": _NO_SIGMOID,
                "below": below + _AND_NO_SIGMOID,
                "above": _ABOVE + _AND_NO_SIGMOID,
            }
            if title.endswith("sigmoid")
            else {"below": below, "above": _ABOVE},
            title,
        )
        for title in ("beta/gamma", "beta/gamma with sigmoid")
        for learned, end, cells, below, values in (
            (
                "beta",
                "θmin",
                ("-e/k", _THETA_MIN_BELOW, "ζ/k"),
                _MIN_BELOW,
                lambda t: tuple(
                    t.θmin * v for v in (-t.e / t.k, -t.n / t.k + t.ζ / t.k + 1, t.ζ / t.k)
                ),
            ),
            (
                "gamma",
                "θmax",
                ("e/k", _THETA_MAX_BELOW, "-ζ/k + 1"),
                _MAX_BELOW,
                lambda t: tuple(
                    t.θmax * v for v in (t.e / t.k, t.n / t.k - t.ζ / t.k, -t.ζ / t.k + 1)
                ),
            ),
        )
    ),
)

TABLE3 = (
    PrintedRow("scale", ("e", "n", "p"), lambda t: (t.e, t.n, t.p), {}, "symmetric s"),
    PrintedRow(
        "max",
        ("2e/k", "2n/k", "2p/k"),
        lambda t: tuple(2 / t.k * v for v in (t.e, t.n, t.p)),
        {},
        "symmetric θmax",
    ),
    *(
        PrintedRow(
            "gamma",
            ("θmax·2e/k", "θmax·2n/k", "θmax·2p/k"),
            lambda t: tuple(t.θmax * 2 / t.k * v for v in (t.e, t.n, t.p)),
            dict.fromkeys(REGIONS, _NO_SIGMOID) if title.endswith("sigmoid") else {},
            title,
        )
        for title in ("symmetric γ", "symmetric γ with sigmoid")
    ),
)

TABLES = {"table1": TABLE1, "table3": TABLE3}


class Comparison(NamedTuple):
    row: PrintedRow
    region: str
    formula: str
    printed: float
    exact: float

    @property
    def differs(self) -> bool:
        return not abs(self.printed - self.exact) <= SAME

    @property
    def name(self) -> str:
        return f"∂x̂/∂{SYMBOLS[self.row.learned]}, {self.row.title}"


def compare(rows: tuple[PrintedRow, ...]) -> list[Comparison]:
    """Every cell of a table, in its order."""
    x = torch.tensor(POINTS, dtype=torch.float64)
    return [
        Comparison(row, *cell)
        for row in rows
        for cell in zip(
            REGIONS,
            row.printed,
            row.values(_terms(row.title)),
            exact(row.title, x)[row.learned].tolist(),
            strict=True,
        )
    ]


def markdown(name: str) -> str:
    """The table as printed beside the exact gradients, and why cells differ."""
    found = compare(TABLES[name])
    t = _terms("symmetric s" if name == "table3" else "min/max")
    head = " | ".join(f"{region}: printed | value | exact" for region in REGIONS)
    lines = [
        f"# Table {name[-1]}: the gradients as printed and as the operators compute them",
        "",
        f"{BITS} bits, range {'±' if name == 'table3' else f'{LOW} to '}{HIGH}, at x = {POINTS[0]} "
        f"(inside), {POINTS[1]} (below) and {POINTS[2]} (above). e = rint(x/s) - x/s = {t.e:.4f}, "
        f"s = {t.s:.4f}, k = {t.k}, n = {t.n:g}, p = {t.p:g}"
        + (f", ζ = rint(z) - z = {t.ζ:.4f}, n = rint(z)." if name == "table1" else "."),
        "≠ marks an exact value that the printed formula does not give. The regions are decided by "
        "rint(x/s) and closed.",
        "",
        f"| gradient | {head} |",
        "|" + "---|" * 10,
    ]
    for start in range(0, len(found), 3):
        parts = [
            f"{c.formula} | {c.printed:.4f} | {c.exact:.4f}{' **≠**' if c.differs else ''}"
            for c in found[start : start + 3]
        ]
        lines.append(f"| {found[start].name} | {' | '.join(parts)} |")
    reasons: dict[str, list[str]] = {}
    for cell in found:
        if cell.differs:
            reason = cell.row.reasons[cell.region]
            reasons.setdefault(reason, []).append(f"{cell.name} {cell.region}")
    lines += ["", "Why cells differ:", ""]
    lines += [f"- {'; '.join(names)}: {reason}." for reason, names in reasons.items()]
    if name == "table3":
        lines += [
            "",
            "Eq. 10 prints s = 2·θmax/b; the rows of this table are those of s = 2·θmax/k, which "
            "the operators compute.",
        ]
    return "\n".join(lines) + "\n"


def judge(name: str) -> list[Verdict]:
    """Whether the printed table is right; of Table 3 also what the paper concludes from it."""
    found = compare(TABLES[name])
    printed = [cell for cell in found if "sigmoid" not in cell.row.title]
    wrong = [f"{cell.name} {cell.region}" for cell in printed if cell.differs]
    measured = f"{len(wrong)} of {len(printed)} cells differ"
    verdicts = [
        Verdict(
            f"Table {name[-1]} gives the gradients of "
            + ("eq. 1, without sigmoid." if name == "table1" else "eq. 10 with k for b."),
            measured + (f": {'; '.join(wrong)}" if wrong else ""),
            not wrong,
        )
    ]
    if name == "table3":
        x = torch.tensor(POINTS, dtype=torch.float64)
        by_scale, by_max, by_gamma = (
            exact(title, x)[learned]
            for title, learned in (
                ("symmetric s", "scale"),
                ("symmetric θmax", "max"),
                ("symmetric γ", "gamma"),
            )
        )
        factors = [by_max / by_scale, by_gamma / by_scale]
        spread = max((f.max() - f.min()).item() for f in factors)
        verdicts.append(
            Verdict(
                "Symmetric gradients are identical except for scaling factors.",
                f"θmax over s: {factors[0].mean():.6g}, γ over s: {factors[1].mean():.6g}, the "
                f"same at all points to {spread:.1g}",
                spread < SAME,
            )
        )
    return verdicts


def table_csv(name: str) -> str:
    header = ("gradient", "parameterization", "region", "x", "printed", "exact", "differs")
    rows = [
        (
            f"∂x̂/∂{SYMBOLS[cell.row.learned]}",
            cell.row.title,
            cell.region,
            POINTS[REGIONS.index(cell.region)],
            f"{cell.printed:.6g}",
            f"{cell.exact:.6g}",
            int(cell.differs),
        )
        for cell in compare(TABLES[name])
    ]
    return as_csv(header, rows)
