"""`summary`: every quantizer of a model as a row of a table."""

from __future__ import annotations

from torch import nn

from asymq.quantizers import Quantizer, named_quantizers

_TITLES = ("name", "kind", "bits", "granularity", "parameterization", "range", "collapsed")


def summary(model: nn.Module) -> str:
    """A table with one row per quantizer: name, kind, bits, granularity, parameterization, range
    (the outermost ends where there are several) and how many of its ranges have collapsed, which is
    a raw scale of at most eps.
    """
    rows = [_TITLES, *(_row(name, quantizer) for name, quantizer in named_quantizers(model))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, quantizer: Quantizer) -> tuple[str, ...]:
    spec = quantizer.spec
    symmetric = ["symmetric"] if spec.symmetric else []
    return (
        name,
        quantizer.kind,
        str(spec.bits),
        str(spec.granularity),
        " ".join([*symmetric, spec.parameterization, *spec.options]),
        quantizer.describe_range(),
        _collapsed(quantizer),
    )


def _collapsed(quantizer: Quantizer) -> str:
    collapsed = quantizer.collapsed()
    if collapsed is None:
        return "-"
    count = int(collapsed.sum())
    return f"{count} of {collapsed.numel()}" if count else "no"
