"""What an export has done with every quantizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from asymq.quantizers import Quantizer
from asymq.summary import table

_TITLES = ("name", "kind", "bits", "container", "scale", "zero point", "tensor", "note")


@dataclass
class Row:
    """A quantizer in the files. container: the type of its integers, such as "uint16" or "int4",
    "float32" of a constant without any, "" where it is in no file. scale, zero_point: of the shape
    of its ranges, float32 and int32; None: none are written. tensor: its name in the file. note:
    what is not as it was trained, or why it is in no file."""

    name: str
    kind: str
    bits: int
    container: str = ""
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    tensor: str = ""
    note: str = ""

    @classmethod
    def of(cls, name: str, quantizer: Quantizer) -> Row:
        return cls(name, quantizer.kind, quantizer.spec.bits)


@dataclass
class ExportReport:
    """One row per quantizer of `asymq.named_quantizers`, in its order, and the files. As a text it
    is a table like `asymq.summary`'s."""

    rows: list[Row]
    files: tuple[Path, ...] = field(default=())

    def __str__(self) -> str:
        lines = table(
            _TITLES,
            [
                (
                    *(row.name, row.kind, str(row.bits), row.container or "-"),
                    *(_span(row.scale), _span(row.zero_point), row.tensor or "-", row.note),
                )
                for row in self.rows
            ],
        )
        return "\n".join([*lines, "", *(f"{path}: {_size(path)}" for path in self.files)])


def _span(values: Tensor | None) -> str:
    """One value, or the least and the largest, in a few characters."""
    if values is None:
        return "-"
    low, high = (f"{end.item():.4g}" for end in torch.aminmax(values))
    return low if low == high else f"{low} to {high}"


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB" if path.exists() else "no longer there"
