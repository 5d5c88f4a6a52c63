"""`summary`: every quantizer of a model as a row of a table, and what has none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from asymq.layers import quantized_parameters
from asymq.quantizers import QuantAct, Quantizer, elements, named_quantizers

_TITLES = ("name", "kind", "bits", "granularity", "parameterization", "range", "collapsed")
_INDEX = re.compile(r"(?<![^. ])\d+(?=\.)")


def summary(model: nn.Module) -> str:
    """A table with one row per quantizer: name, kind, bits, granularity, parameterization, range
    (the outermost ends where there are several; of a dynamic one the factors) and how many of its
    ranges have collapsed, which is a raw scale of at most eps.

    Below it, a line for each quantizer that several layers share, and last what is not quantized:
    the parameters without a quantizer, biases included, as a share of all (ranges do not count).
    """
    lines = table(_TITLES, [_row(name, q) for name, q in named_quantizers(model)])
    notes = [*_shared(model), *_float(model)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a table, its columns as wide as they need to be."""
    rows = [titles, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    rows.insert(1, tuple("-" * width for width in widths))
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


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


def _shared(model: nn.Module) -> list[str]:
    """The other names of quantizers that serve several layers."""
    names: defaultdict[Quantizer, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            names[module].append(name)
    return _alike(
        f"{first}: one {'input' if isinstance(quantizer, QuantAct) else 'weight'} with "
        + ", ".join(others)
        for quantizer, (first, *others) in names.items()
        if others
    )


def _float(model: nn.Module) -> Iterator[str]:
    quantized = {elements(parameter) for _, _, parameter in quantized_parameters(model)}
    ranges = {id(p) for _, q in named_quantizers(model) for p in q.parameters()}
    everything = {
        elements(p): (name, p.numel())
        for name, p in model.named_parameters()
        if id(p) not in ranges
    }
    left = [value for key, value in everything.items() if key not in quantized]
    total = sum(count for _, count in everything.values())
    count = sum(count for _, count in left)
    if not left:
        return
    share = f"{count:,} of {total:,} parameters ({count / total:.2%})"
    yield f"not quantized: {share}: {', '.join(_alike(name for name, _ in left))}"


def _alike(lines: Iterable[str]) -> list[str]:
    """Lines with names, those that differ by the indices of layers alone once, with * for them."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for line in lines:
        alike[_INDEX.sub("*", line)].append(line)
    return [same[0] if len(same) == 1 else pattern for pattern, same in alike.items()]
