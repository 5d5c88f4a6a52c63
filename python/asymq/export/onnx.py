"""A model as ONNX: QuantizeLinear and DequantizeLinear compute what it was trained with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from asymq.export.graph import (
    constant,
    exportable,
    fill,
    finish,
    initializer,
    laid_out,
    placement,
    put_float,
    replace,
    type_of,
    write,
)
from asymq.export.grids import FLOAT, Container, Grid, spread
from asymq.export.report import ExportReport, Row
from asymq.export.tracing import OLDEST_OPSET, Traced, Use, need_onnx, trace

if TYPE_CHECKING:
    import onnx_ir as ir

WHAT = "asymq.export_onnx"
# Without it onnxruntime multiplies weights of 4 bits with activations that it has put on 8 bits.
SESSION_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "1"}


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike,
    *,
    dynamic: bool = True,
    weights: str = "integer",
    opset: int | None = None,
) -> ExportReport:
    """Writes `model`, in evaluation mode, as an ONNX file that computes what it computes.

    example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
    dynamic: axis 0 of every input is "batch", axis 1 of tokens and masks "length"; else all shapes
    are those of the example. weights: "integer" codes (4 bits packed), each with a
    DequantizeLinear, or the "float" values that they stand for. opset: 21, the default, or later.

    Activations become [Clip,] QuantizeLinear and DequantizeLinear. The model is left as it was.
    Above 1.5 GiB weights go into ``<path>.data``.

    ImportError: a package of asymq[onnx] is missing. RuntimeError: a range that is not set.
    ValueError: a quantizer that is off or observing, a dynamic range, an activation's range that no
    integer type of 16 bits holds, parameters that are not float32, a model that torch.export cannot
    trace. Nothing is written then.
    """
    need_onnx(WHAT)
    if weights not in ("integer", "float"):
        raise ValueError(f"{WHAT}: weights must be 'integer' or 'float', got {weights!r}")
    opset = OLDEST_OPSET if opset is None else opset
    if opset < OLDEST_OPSET:
        raise ValueError(
            f"{WHAT}: opset must be at least {OLDEST_OPSET}, the first with integers of 4 and 16 "
            f"bits, got {opset}"
        )
    model, quantizers = exportable(model, WHAT)
    traced = trace(model, quantizers, example_inputs, dynamic=dynamic, opset=opset, what=WHAT)
    report = ExportReport([Row.of(name, quantizer) for name, quantizer in quantizers.items()])
    rows = {row.name: row for row in report.rows}
    for use in traced.uses:
        if use.is_weight and weights == "float":
            put_float(traced, use, rows[use.name], "dequantized")
        elif use.is_weight:
            _put_integers(traced, use, rows[use.name])
        else:
            _put_operators(traced, use, rows[use.name])
    finish(traced, report, quantizers)
    traced.model.metadata_props["asymq.session_config"] = json.dumps(SESSION_CONFIG)
    report.files = write(traced.model, Path(path))
    return report


def _put_integers(traced: Traced, use: Use, row: Row) -> None:
    """A weight as codes, and the DequantizeLinear that reads them."""
    import onnx_ir as ir

    grid, weight = Grid.of(use.quantizer), constant(use)
    container = grid.container(constant=True)
    if container is None:
        put_float(traced, use, row, "dequantized: no integer of 16 bits holds its zero point")
        return
    stored = grid.codes(weight) + spread(container.zero_point, weight.shape)
    name = use.tensor
    stored = laid_out(stored, use)
    codes = initializer(traced, f"{name}_quantized", stored, container.dtype)
    attributes, constants = _ranges(traced, use, grid, container, name, stored.shape)
    node = ir.node("DequantizeLinear", [codes, *constants], attributes)
    result = node.outputs[0]
    result.shape, result.type, result.name = (
        use.result.shape,
        use.result.type,
        f"{name}_dequantized",
    )
    replace(traced, use, [node], result)
    fill(row, codes.name, container.dtype, use.note, use, grid, container)


def _put_operators(traced: Traced, use: Use, row: Row) -> None:
    """Clip, QuantizeLinear and DequantizeLinear."""
    import onnx_ir as ir

    grid = Grid.of(use.quantizer)
    container = grid.container()
    assert container is not None
    source, name, dims = use.source, use.tensor, use.source.shape
    assert dims is not None
    # Of an axis with one range the size does not matter.
    shape = [n if isinstance(n, int) else 1 for n in dims]
    nodes, x = [], source
    clip = grid.clip(container)
    if clip is not None:
        ends = [spread(end.reshape(use.blocks), shape) for end in clip]
        low, high = (
            initializer(traced, f"{name}_{which}", end)
            for which, end in zip(("min", "max"), ends, strict=True)
        )
        if ends[0].dim() == 0:
            nodes.append(ir.node("Clip", [x, low, high]))
        else:
            nodes.append(ir.node("Max", [x, low]))
            nodes.append(ir.node("Min", [nodes[-1].outputs[0], high]))
        for node in nodes:
            node.outputs[0].shape, node.outputs[0].type = source.shape, source.type
        x = nodes[-1].outputs[0]
        x.name = f"{name}_clipped"
    attributes, constants = _ranges(traced, use, grid, container, name, shape)
    dtype = {"output_dtype": int(type_of(container.dtype))} if grid.offset is None else {}
    quantize = ir.node("QuantizeLinear", [x, *constants], attributes | dtype)
    codes = quantize.outputs[0]
    codes.name, codes.shape = f"{name}_quantized", source.shape
    codes.type = ir.TensorType(type_of(container.dtype))
    dequantize = ir.node("DequantizeLinear", [codes, *constants], attributes)
    result = dequantize.outputs[0]
    result.shape, result.type, result.name = source.shape, source.type, f"{name}_dequantized"
    replace(traced, use, [*nodes, quantize, dequantize], result)
    fill(row, name, container.dtype, use.note, use, grid, container)


def _ranges(
    traced: Traced, use: Use, grid: Grid, container: Container, name: str, shape
) -> tuple[dict[str, int], list[ir.Value]]:
    """The attributes axis and block_size, scale and zero point, for a tensor of `shape`. Symmetric
    grids have no zero point: onnxruntime puts int8 with one on uint8, and fails where it does."""
    tensors = {"scale": grid.scale}
    if grid.offset is not None:
        tensors["zero_point"] = container.zero_point
    axis, block = placement(use.blocks, shape)
    attributes = {}
    if axis is not None:
        attributes["axis"] = axis
    if block is not None:
        attributes["block_size"] = block
    constants = []
    for which, tensor in tensors.items():
        if use.transposed and tensor.dim() == 2:
            tensor = tensor.t()
        tensor = tensor.reshape(use.blocks)
        if axis is None:
            tensor = tensor.reshape(())
        elif block is None:
            tensor = spread(tensor, shape).flatten()
        dtype = FLOAT if which == "scale" else container.dtype
        constants.append(initializer(traced, f"{name}_{which}", tensor, dtype))
    return attributes, constants
