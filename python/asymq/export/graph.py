"""What all files of ONNX have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from asymq._build import VERSION
from asymq.checkpoint import whole_files
from asymq.export.common import quantizers_of
from asymq.export.grids import FLOAT, Container, Grid
from asymq.export.report import ExportReport, Row
from asymq.export.tracing import Traced, Use
from asymq.quantizers import Quantizer, WeightQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

# A protobuf ends at 2 GiB.
_LARGEST_FILE = 3 << 29


def exportable(model: nn.Module, what: str) -> tuple[nn.Module, dict[str, Quantizer]]:
    """See `quantizers_of`. ValueError, too: what ONNX cannot hold."""
    model, quantizers = quantizers_of(model, what)
    _need_static(quantizers, what)
    _need_float32(model, quantizers, what)
    for name, quantizer in quantizers.items():
        grid = Grid.of(quantizer)
        if not isinstance(quantizer, WeightQuantizer) and grid.container() is None:
            raise ValueError(
                f"{what}: {name}: its range {quantizer.describe_range()} lies too far from 0 for "
                f"{grid.spec.bits} bits: integers of 16 bits hold no such zero point; calibrate "
                "with force_zero=True, or give it fewer bits"
            )
    return model, quantizers


def _need_float32(model: nn.Module, quantizers: Mapping[str, Quantizer], what: str) -> None:
    """ValueError: parameters of another type."""
    ranges = {id(p) for quantizer in quantizers.values() for p in quantizer.parameters()}
    for name, parameter in model.named_parameters():
        other = parameter.is_floating_point() and parameter.dtype != torch.float32
        if other and id(parameter) not in ranges:
            raise ValueError(
                f"{what}: {name} is {str(parameter.dtype).removeprefix('torch.')}, and runtimes "
                "quantize float32 as asymq does, half types otherwise: call model.float() first"
            )


def _need_static(quantizers: Mapping[str, Quantizer], what: str) -> None:
    """ValueError: a dynamic range, which is none that a file could hold."""
    live = [name for name, quantizer in quantizers.items() if quantizer.live]
    if live:
        raise ValueError(
            f"{what}: {live[0]} has a dynamic range ({len(live)} in all), which changes with the "
            "data and stands in no file: prepare the model with static ranges "
            "(QuantSpec(dynamic=False), QuantConfig.npu), or export its weights with "
            "asymq.export_checkpoint"
        )


def put_float(traced: Traced, use: Use, row: Row, note: str) -> None:
    """A weight as the values of its codes, under its own name."""
    values = Grid.of(use.quantizer).values(constant(use))
    source, name = use.source, use.tensor
    value = initializer(traced, f"{name}.dequantized", laid_out(values, use))
    replace(traced, use, [], value)
    if not source.uses():
        traced.model.graph.initializers.pop(name)
        value.name = name
    fill(row, value.name, FLOAT, note, use)


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
    with whole_files(path.parent, last=path.name) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text)
        ir.save(model, folder / path.name, external_data=data)
    names = [path.name, *([data] if data else []), *texts]
    return tuple(path.parent / name for name in names)


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


def constant(use: Use) -> Tensor:
    """The weight, as the model has it."""
    tensor = use.source.const_value
    assert tensor is not None
    return torch.from_numpy(tensor.numpy())


def laid_out(values: Tensor, use: Use) -> Tensor:
    return values.t().contiguous() if use.transposed else values


def type_of(name: str) -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType[name.upper() if name != FLOAT else "FLOAT"]


def initializer(traced: Traced, name: str, values: Tensor, dtype: str = FLOAT) -> ir.Value:
    import onnx_ir as ir

    array = values.cpu().contiguous().numpy().astype(type_of(dtype).numpy())
    tensor = ir.tensor(array, dtype=type_of(dtype), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    traced.model.graph.register_initializer(value)
    return value


def replace(traced: Traced, use: Use, nodes: list[ir.Node], result: ir.Value) -> None:
    """Puts `nodes` in the place of a use's, and `result` in that of what it gave."""
    graph, old = traced.model.graph, use.result
    for i, value in enumerate(graph.outputs):
        if value is old:
            result.name = old.name
            graph.outputs[i] = result
    graph.insert_before(use.node, nodes)
    old.replace_all_uses_with(result)
    graph.remove(use.node, safe=True)


def fill(
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
