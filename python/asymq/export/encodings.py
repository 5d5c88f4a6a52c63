"""A model as AIMET and QNN take it: float ONNX, and a file of encodings by the names of tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from asymq._build import VERSION
from asymq.export.graph import (
    constant,
    exportable,
    finish,
    initializer,
    placement,
    put_float,
    replace,
    write,
)
from asymq.export.grids import Grid
from asymq.export.report import ExportReport, Row
from asymq.export.tracing import OLDEST_OPSET, Traced, Use, need_onnx, trace

if TYPE_CHECKING:
    import onnx_ir as ir

WHAT = "asymq.export_encodings"
VERSIONS = ("2.0.0", "1.0.0", "0.6.1")
# Of the integers of version 2.0.0.
_BITS = (2, 4, 8, 16)
# What moves elements and does not compute: AIMET has no quantizer of their results.
_MOVES = {"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose"}
_MOVES |= {"Split", "Tile", "Unsqueeze"}


def export_encodings(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike,
    *,
    version: str = "2.0.0",
    widen: bool = False,
    tables: bool = False,
    dynamic: bool = True,
) -> ExportReport:
    """Writes `model` as float ONNX, its weights on their grids, and beside it, with the suffix
    .encodings, the grid of every tensor.

    version: of the encodings, "2.0.0", "1.0.0" or "0.6.1" (deprecated, without groups). widen: puts
    activations of other bits than 2, 4, 8 and 16 on 16, which moves their grid by less than one of
    its steps. tables: writes the encodings of embedding tables per row, too, which AIMET's QuantSim
    refuses. example_inputs, dynamic: as of :func:`export_onnx`. The model is left as it was.

    Refuses what export_onnx refuses, and with ValueError: activations whose range lies on one side
    of 0, of other bits than those without `widen` in version 2.0.0, groups in 0.6.1. Nothing is
    written then.
    """
    need_onnx(WHAT)
    if version not in VERSIONS:
        raise ValueError(f"{WHAT}: version must be one of {', '.join(VERSIONS)}, got {version!r}")
    path = Path(path)
    encodings_path = path.with_suffix(".encodings")
    if encodings_path == path:
        raise ValueError(f"{WHAT}: path must be that of the ONNX file, got {path}")
    model, quantizers = exportable(model, WHAT)
    for name, quantizer in quantizers.items():
        if quantizer.kind not in ("weight", "norm_weight"):
            _of_activation(name, Grid.of(quantizer), version, widen)
    traced = trace(
        model,
        quantizers,
        example_inputs,
        dynamic=dynamic,
        opset=OLDEST_OPSET,
        what=WHAT,
        untie=True,
    )
    report = ExportReport([Row.of(name, quantizer) for name, quantizer in quantizers.items()])
    rows = {row.name: row for row in report.rows}
    entries: list[_Entry] = []
    taken: set[ir.Value] = set()
    for use in traced.uses:
        if use.is_weight:
            entry = _weight(traced, use, rows[use.name], tables)
        else:
            entry = _activation(traced, use, rows[use.name], version, widen, taken)
        if entry is not None:
            entries.append(entry)
    finish(traced, report, quantizers)
    text = json.dumps(_FORMATS[version](entries), indent=1) + "\n"
    report.files = write(traced.model, path, {encodings_path.name: text})
    return report


class _Held(NamedTuple):
    """A grid as encodings have it: integers of so many bits, a zero point to add to codes."""

    signed: bool
    bits: int
    scale: Tensor
    zero_point: Tensor
    note: str = ""

    @property
    def dtype(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


class _Entry(NamedTuple):
    """tensor: its name in the graph. axis, block: as `placement` finds them. scale, zero_point: of
    the shape in which they lie on the tensor, or none."""

    tensor: str
    is_weight: bool
    held: _Held
    axis: int | None
    block: int | None
    transposed: bool


# ---- what holds a grid ---------------------------------------------------------------------------


def _own(grid: Grid) -> _Held | None:
    """Its own bits; None: 0 lies outside of it."""
    if grid.offset is None:
        return _Held(True, grid.spec.bits, grid.scale, torch.zeros_like(grid.lowest))
    if bool((grid.lowest > 0).any() or (grid.highest < 0).any()):
        return None
    return _Held(False, grid.spec.bits, grid.scale, -grid.lowest)


def _of_weight(grid: Grid) -> _Held | None:
    """Its own bits, or what else holds its codes, which are known; None: nothing does."""
    own = _own(grid)
    if own is not None and own.bits in _BITS:
        return own
    container = grid.container(constant=True)
    if container is None:
        return None
    bits = int(container.dtype.lstrip("uint"))
    return _Held(grid.offset is None, bits, grid.scale, container.zero_point.long())


def _of_activation(name: str, grid: Grid, version: str, widen: bool) -> _Held:
    spec, held = grid.spec, _own(grid)
    if held is None:
        raise ValueError(
            f"{WHAT}: {name}: its range lies on one side of 0, and encodings have none such: "
            "calibrate with force_zero=True, or use asymq.export_onnx"
        )
    if spec.bits in _BITS:
        if grid.offset is None and not spec.full_range:
            return held._replace(note="the file's grid has one more step below zero")
        return held
    if widen:
        return _widened(grid)
    if version == "2.0.0":
        raise ValueError(
            f"{WHAT}: {name} has {spec.bits} bits, and version 2.0.0 knows "
            f"{', '.join(map(str, _BITS))}: write version='1.0.0', which holds them, or put them "
            "on 16 bits with widen=True"
        )
    return held


def _widened(grid: Grid) -> _Held:
    """The same range in steps of 16 bits."""
    if grid.offset is None:
        scale = grid.scale * grid.highest / 32767
        return _Held(True, 16, scale, torch.zeros_like(grid.lowest), "widened to 16 bits")
    scale = grid.scale * grid.spec.steps / 65535
    zero_point = -torch.round(grid.scale * grid.lowest / scale).long()
    return _Held(False, 16, scale, zero_point.clamp(0, 65535), "widened to 16 bits")


# ---- the graph -----------------------------------------------------------------------------------


def _weight(traced: Traced, use: Use, row: Row, tables: bool) -> _Entry | None:
    """A weight on its grid, and its entry; None: it gets none, and the row says why."""
    shape = constant(use).shape
    axis, block = placement(use.blocks, shape[::-1] if use.transposed else shape)
    held, note = _of_weight(Grid.of(use.quantizer)), ""
    is_table = all(node.op_type == "Gather" for node, _ in use.result.uses())
    if held is None:
        note = "on its grid, without encoding: no integer of 16 bits holds its zero point"
    elif is_table and axis is not None and not tables:
        note = "on its grid, without encoding: QuantSim takes none per row of a table (tables=True)"
        held = None
    before = (row.container, row.scale, row.zero_point, row.note)
    put_float(traced, use, row, note)
    tensor = row.tensor.split(", ")[-1]
    if held is None:
        if before[0]:  # another reader has one
            row.container, row.scale, row.zero_point = before[:3]
        return None
    row.container, row.scale, row.zero_point = held.dtype, held.scale, held.zero_point.int()
    row.note = row.note or before[3]
    return _Entry(tensor, True, held, axis, block, use.transposed)


def _activation(
    traced: Traced, use: Use, row: Row, version: str, widen: bool, taken: set[ir.Value]
) -> _Entry:
    held = _of_activation(use.name, Grid.of(use.quantizer), version, widen)
    dims = use.source.shape
    assert dims is not None
    axis, block = placement(use.blocks, [n if isinstance(n, int) else 1 for n in dims])
    carrier = _carrier(use, axis is None, taken)
    if carrier is None:
        carrier = _multiplied(traced, use)
    elif carrier is not use.source and not carrier.is_graph_input():
        own, use.source.name = use.source.name, f"{use.source.name}_moved"
        carrier.name = own
    taken.add(carrier)
    replace(traced, use, [], use.source)
    tensor = carrier.name or ""
    row.tensor = f"{row.tensor}, {tensor}" if row.tensor else tensor
    row.container, row.scale, row.zero_point = held.dtype, held.scale, held.zero_point.int()
    row.note = held.note
    return _Entry(tensor, False, held, axis, block, False)


def _carrier(use: Use, per_tensor: bool, taken: set[ir.Value]) -> ir.Value | None:
    """The tensor that AIMET quantizes in the place of the source: itself, or what it was before
    its elements were moved, if nobody else reads that; None: there is none that is not `taken`."""
    value = use.source
    while (node := value.producer()) is not None and node.op_type in _MOVES:
        before = node.inputs[0]
        if not per_tensor or len(node.outputs) > 1 or before is None or before.is_initializer():
            return None
        readers = [reader for reader, _ in before.uses() if reader.op_type != "Shape"]
        if len(readers) > 1 or before.is_graph_output():
            return None
        value = before
    made = value.producer()
    return None if value in taken or (made is not None and made.domain) else value


def _multiplied(traced: Traced, use: Use) -> ir.Value:
    """The source times 1, which AIMET quantizes by itself."""
    import onnx_ir as ir

    graph, source = traced.model.graph, use.source
    name = source.name
    one = graph.initializers.get("asymq.one")
    if one is None:
        one = initializer(traced, "asymq.one", torch.ones(()))
    node = ir.node("Mul", [source, one])
    result = node.outputs[0]
    source.name, result.name = f"{name}_float", name
    result.shape, result.type = source.shape, source.type
    graph.insert_before(use.node, node)
    use.node.replace_input_with(0, result)
    return result


# ---- the formats ---------------------------------------------------------------------------------


def _values(tensor: Tensor) -> Any:
    return tensor.cpu().tolist()


def _flat(entry: _Entry) -> tuple[list, list]:
    """Scales and offsets of the older versions, which count from the least code: of a signed grid
    too, and in the order of [out, in]."""
    held = entry.held
    zero_point = held.zero_point + (2 ** (held.bits - 1) if held.signed else 0)
    return _values(held.scale.flatten()), _values(-zero_point.flatten())


def _format_2_0_0(entries: list[_Entry]) -> dict[str, Any]:
    def encoding(entry: _Entry) -> dict[str, Any]:
        held = entry.held
        tensors = [held.scale, held.zero_point]
        if entry.block is not None:
            tensors = [t.t() if entry.transposed else t for t in tensors]
        elif entry.axis is not None:
            tensors = [t.flatten() for t in tensors]
        else:
            tensors = [t.reshape(()) for t in tensors]
        scale, zero_point = tensors
        result = {"name": entry.tensor, "output_dtype": held.dtype, "y_scale": _values(scale)}
        if bool(zero_point.any()):
            result["y_zero_point"] = _values(zero_point)
        if entry.axis is not None:
            result["axis"] = entry.axis
        if entry.block is not None:
            result["block_size"] = entry.block
        return result

    return {
        "version": "2.0.0",
        "producer": {"package": "asymq", "version": VERSION},
        "encodings": [encoding(entry) for entry in entries],
    }


def _format_1_0_0(entries: list[_Entry]) -> dict[str, Any]:
    def encoding(entry: _Entry) -> dict[str, Any]:
        kind = "BLOCK" if entry.block else "TENSOR" if entry.axis is None else "CHANNEL"
        scale, offset = _flat(entry)
        result = {
            "name": entry.tensor,
            "dtype": "INT",
            "enc_type": f"PER_{kind}",
            "bw": entry.held.bits,
            "is_sym": entry.held.signed,
            "scale": scale,
            "offset": offset,
        }
        return result | ({"block_size": entry.block} if entry.block else {})

    return {
        "version": "1.0.0",
        "producer": {"package": "asymq", "version": VERSION},
        "activation_encodings": [encoding(e) for e in entries if not e.is_weight],
        "param_encodings": [encoding(e) for e in entries if e.is_weight],
        "excluded_layers": [],
    }


def _format_0_6_1(entries: list[_Entry]) -> dict[str, Any]:
    def encoding(entry: _Entry) -> list[dict[str, Any]]:
        if entry.block is not None:
            raise ValueError(
                f"{WHAT}: {entry.tensor} has ranges in groups, which version 0.6.1 does not know: "
                "write version='2.0.0'"
            )
        held = entry.held
        return [
            {
                "bitwidth": held.bits,
                "dtype": "int",
                "is_symmetric": str(held.signed),
                "scale": scale,
                "offset": offset,
                "min": scale * offset,
                "max": scale * (offset + 2**held.bits - 1),
            }
            for scale, offset in zip(*_flat(entry), strict=True)
        ]

    return {
        "version": "0.6.1",
        "activation_encodings": {e.tensor: encoding(e) for e in entries if not e.is_weight},
        "param_encodings": {e.tensor: encoding(e) for e in entries if e.is_weight},
    }


_FORMATS = {"2.0.0": _format_2_0_0, "1.0.0": _format_1_0_0, "0.6.1": _format_0_6_1}
