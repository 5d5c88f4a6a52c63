"""`summary`: every quantizer of a model as a row of a table."""

from __future__ import annotations

from torch import nn

from asymq.quantizer import Quantizer, describe_range, named_quantizers
from asymq.specs import PerChannel, PerTensor

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
    options = [option for option in ("sigmoid", "dynamic", "fix_min") if getattr(spec, option)]
    return (
        name,
        quantizer.kind,
        str(spec.bits),
        _granularity(spec.granularity),
        " ".join([*(["symmetric"] if spec.symmetric else []), spec.parameterization, *options]),
        describe_range(quantizer),
        _collapsed(quantizer),
    )


def _granularity(granularity) -> str:
    if isinstance(granularity, PerTensor):
        return "per tensor"
    axis = "" if granularity.axis is None else f", axis {granularity.axis}"
    if isinstance(granularity, PerChannel):
        return f"per channel{axis}"
    return f"groups of {granularity.size}{axis}"


def _collapsed(quantizer: Quantizer) -> str:
    if quantizer.spec.dynamic or not quantizer.calibrated:
        return "-"
    collapsed = quantizer.collapsed()
    count = int(collapsed.sum())
    return f"{count} of {collapsed.numel()}" if count else "no"
