"""A model as ONNX: QuantizeLinear and DequantizeLinear compute what it was trained with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from asymq._build import VERSION
from asymq.checkpoint import whole_files
from asymq.export.common import quantizers_of
from asymq.export.grids import FLOAT, Container, Grid, spread
from asymq.export.report import ExportReport, Row
from asymq.export.tracing import (
    OLDEST_OPSET,
    Traced,
    Use,
    need_float32,
    need_onnx,
    need_static,
    trace,
)
from asymq.quantizers import Quantizer, WeightQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

WHAT = "asymq.export_onnx"
# Without it onnxruntime multiplies weights of 4 bits with activations that it has put on 8 bits.
SESSION_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "1"}
# A protobuf ends at 2 GiB.
_LARGEST_FILE = 3 << 29


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


# ---- what all files of ONNX have in common -------------------------------------------------------


def exportable(model: nn.Module, what: str) -> tuple[nn.Module, dict[str, Quantizer]]:
    """See `quantizers_of`. ValueError, too: what ONNX cannot hold."""
    model, quantizers = quantizers_of(model, what)
    need_static(quantizers, what)
    need_float32(model, quantizers, what)
    for name, quantizer in quantizers.items():
        grid = Grid.of(quantizer)
        if not isinstance(quantizer, WeightQuantizer) and grid.container() is None:
            raise ValueError(
                f"{what}: {name}: its range {quantizer.describe_range()} lies too far from 0 for "
                f"{grid.spec.bits} bits: integers of 16 bits hold no such zero point; calibrate "
                "with force_zero=True, or give it fewer bits"
            )
    return model, quantizers


def put_float(traced: Traced, use: Use, row: Row, note: str) -> None:
    """A weight as the values of its codes, under its own name."""
    values = Grid.of(use.quantizer).values(_constant(use))
    source, name = use.source, use.tensor
    initializer = _initializer(traced, f"{name}.dequantized", _laid_out(values, use))
    _replace(traced, use, [], initializer)
    if not source.uses():
        traced.model.graph.initializers.pop(name)
        initializer.name = name
    _fill(row, initializer.name, FLOAT, note, use)


def finish(traced: Traced, report: ExportReport, quantizers: Mapping[str, Quantizer]) -> None:
    """Leaves nothing in the graph that says where it was made, and says of each quantizer that is
    not in it why."""
    model = traced.model
    model.producer_name, model.producer_version = "asymq", VERSION
    model.doc_string = None
    model.metadata_props.clear()
    model.opset_imports.pop("asymq", None)
    graph = model.graph
    graph.name, graph.doc_string = "asymq", None
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
    for row in report.rows:
        if not row.container and not row.note:
            row.note = "not in the file: no forward reaches it"
    kinds: dict[str, set[int]] = {}
    for quantizer in quantizers.values():
        kinds.setdefault(quantizer.kind, set()).add(quantizer.spec.bits)
    model.metadata_props["asymq.version"] = VERSION
    model.metadata_props["asymq.bits"] = json.dumps({k: sorted(v) for k, v in kinds.items()})


def write(model: ir.Model, path: Path, beside: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """The files that were written: the model, its weights if they are large, texts `beside` it by
    name."""
    import onnx_ir as ir

    sizes = (v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    data = f"{path.name}.data" if sum(sizes) > _LARGEST_FILE else None
    texts = beside or {}
    with whole_files(path.parent) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text)
        ir.save(model, folder / path.name, external_data=data)
    names = [path.name, *([data] if data else []), *texts]
    return tuple(path.parent / name for name in names)


# ---- Q and DQ ------------------------------------------------------------------------------------


def _put_integers(traced: Traced, use: Use, row: Row) -> None:
    """A weight as codes, and the DequantizeLinear that reads them."""
    import onnx_ir as ir

    grid, weight = Grid.of(use.quantizer), _constant(use)
    container = grid.container(constant=True)
    if container is None:
        put_float(traced, use, row, "dequantized: no integer of 16 bits holds its zero point")
        return
    stored = grid.codes(weight) + spread(container.zero_point, weight.shape)
    name = use.tensor
    stored = _laid_out(stored, use)
    codes = _initializer(traced, f"{name}_quantized", stored, container.dtype)
    attributes, *constants = _ranges(traced, use, grid, container, name, stored.shape)
    node = ir.node("DequantizeLinear", [codes, *constants], attributes)
    result = node.outputs[0]
    result.shape, result.type, result.name = (
        use.result.shape,
        use.result.type,
        f"{name}_dequantized",
    )
    _replace(traced, use, [node], result)
    _fill(row, codes.name, container.dtype, use.note, use, grid, container)


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
            _initializer(traced, f"{name}_{which}", end)
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
    attributes, *constants = _ranges(traced, use, grid, container, name, shape)
    quantize = ir.node("QuantizeLinear", [x, *constants], attributes)
    codes = quantize.outputs[0]
    codes.name, codes.shape = f"{name}_quantized", source.shape
    codes.type = ir.TensorType(_type(container.dtype))
    dequantize = ir.node("DequantizeLinear", [codes, *constants], attributes)
    result = dequantize.outputs[0]
    result.shape, result.type, result.name = source.shape, source.type, f"{name}_dequantized"
    _replace(traced, use, [*nodes, quantize, dequantize], result)
    _fill(row, name, container.dtype, use.note, use, grid, container)


def _ranges(
    traced: Traced, use: Use, grid: Grid, container: Container, name: str, shape
) -> tuple[dict[str, int], ir.Value, ir.Value]:
    """The attributes axis and block_size, scale and zero point, for a tensor of `shape`."""
    scale, zero_point = grid.scale, container.zero_point
    if use.transposed and scale.dim() == 2:
        scale, zero_point = scale.t(), zero_point.t()
    axis, block = placement(use.blocks, shape)
    tensors = [tensor.reshape(use.blocks) for tensor in (scale, zero_point)]
    if axis is None:
        attributes = {}
        tensors = [tensor.reshape(()) for tensor in tensors]
    elif block is None:
        attributes = {"axis": axis}
        tensors = [spread(tensor, shape).flatten() for tensor in tensors]
    else:
        attributes = {"axis": axis, "block_size": block}
    return (
        attributes,
        _initializer(traced, f"{name}_scale", tensors[0]),
        _initializer(traced, f"{name}_zero_point", tensors[1], container.dtype),
    )


def placement(blocks, shape) -> tuple[int | None, int | None]:
    """(axis, size of a block) of ranges that lie in `blocks` on a tensor of `shape`. No axis: there
    is one range; no size: one for each index of the axis (groups along a single axis become that).
    """
    along = [axis for axis, count in enumerate(blocks) if count > 1]
    if not along:
        return None, None
    if len(along) == 1:
        return along[0], None
    # In every row, or in every row of every expert.
    (axis,) = [a for a, count in enumerate(blocks) if count != shape[a]] or [len(shape) - 1]
    return axis, shape[axis] // blocks[axis]


# ---- the graph -----------------------------------------------------------------------------------


def _constant(use: Use) -> Tensor:
    """The weight, as the model has it."""
    tensor = use.source.const_value
    assert tensor is not None
    return torch.from_numpy(tensor.numpy())


def _laid_out(values: Tensor, use: Use) -> Tensor:
    return values.t().contiguous() if use.transposed else values


def _type(name: str) -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType[name.upper() if name != FLOAT else "FLOAT"]


def _initializer(traced: Traced, name: str, values: Tensor, dtype: str = FLOAT) -> ir.Value:
    import onnx_ir as ir

    array = values.cpu().contiguous().numpy().astype(_type(dtype).numpy())
    tensor = ir.tensor(array, dtype=_type(dtype), name=name)
    value = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    traced.model.graph.register_initializer(value)
    return value


def _replace(traced: Traced, use: Use, nodes: list[ir.Node], result: ir.Value) -> None:
    """Puts `nodes` in the place of a use's, and `result` in that of what it gave."""
    graph, old = traced.model.graph, use.result
    for i, value in enumerate(graph.outputs):
        if value is old:
            result.name = old.name
            graph.outputs[i] = result
    graph.insert_before(use.node, nodes)
    old.replace_all_uses_with(result)
    graph.remove(use.node, safe=True)


def _fill(
    row: Row,
    tensor: str | None,
    container: str,
    note: str,
    use: Use,
    grid: Grid | None = None,
    held: Container | None = None,
) -> None:
    """A row, or of a quantizer that is called several times what it has of each call."""
    row.tensor = ", ".join(filter(None, (row.tensor, tensor)))
    row.container, row.note = container, note
    if grid is not None and held is not None:
        row.scale, row.zero_point = grid.scale, held.zero_point
