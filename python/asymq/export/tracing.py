"""A model as a graph of ONNX, in which one node stands for each use of a quantizer.

What a target makes of these nodes is its own; names and layouts are common to all.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from asymq.conversion import weights_of_quantizers
from asymq.export.common import need_extra
from asymq.quantizers import Quantizer, use_functions
from asymq.wrappers import evaluating, pretrained_models

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST_OPSET = 21
_DOMAIN = "asymq"
# Axis 1 of these is the tokens.
_OF_TOKENS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")


@dataclass
class Use:
    """A node that stands for a quantizer. source: what it quantizes. blocks: the shape in which its
    ranges lie, in blocks, on that; [1]: one range. is_weight: the source is a constant.
    transposed: a constant's file has it transposed, and so are its blocks."""

    node: ir.Node
    name: str
    quantizer: Quantizer
    blocks: tuple[int, ...]
    is_weight: bool
    transposed: bool = False
    note: str = ""

    @property
    def source(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def result(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def tensor(self) -> str:
        return self.source.name or ""


@dataclass
class Traced:
    """uses: in the order of the graph."""

    model: ir.Model
    uses: list[Use] = field(default_factory=list)


def need_onnx(what: str) -> None:
    """ImportError that names the extra, where a package is missing that writes ONNX."""
    try:
        import ml_dtypes  # noqa: F401
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise need_extra(what, "onnx", error) from None


def trace(
    model: nn.Module,
    quantizers: Mapping[str, Quantizer],
    example_inputs: Any,
    *,
    dynamic: bool,
    opset: int,
    what: str,
    untie: bool = False,
) -> Traced:
    """The graph of `model` in evaluation mode, which is left as it was. untie: each reader of a
    weight has its own.

    Names: parameters have their own, what is quantized is called after its quantizer, inputs are
    those of `example_inputs` or the model's forward, outputs "logits" or "output". Weights of
    matrix products are [in, out].
    """
    call = _call(model, example_inputs, what)
    inputs = call.inputs
    if dynamic:
        inputs = _not_single(inputs)
    with (
        _one_implementation(model),
        _standing_for(quantizers),
        use_functions("unfused"),
        evaluating(call),
    ):
        try:
            with _quiet():
                shapes = _shapes(inputs) if dynamic else None
                exported = torch.export.export(
                    call,
                    tuple(inputs.values()),
                    dynamic_shapes=shapes,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
                program = torch.onnx.export(
                    exported,
                    dynamo=True,
                    opset_version=opset,
                    input_names=list(inputs),
                    dynamic_shapes=shapes,
                    verbose=False,
                )
        except Exception as error:
            way_out = "; with dynamic=False shapes are those of the example" if dynamic else ""
            raise ValueError(
                f"{what}: torch.onnx.export cannot read this {type(model).__name__}"
                f"{way_out}: {_reason(error)}"
            ) from error
    assert program is not None
    traced = Traced(program.model)
    graph = traced.model.graph
    _name_parameters(graph, model)
    for value, name in zip(graph.outputs, _names_of_outputs(call, len(graph.outputs)), strict=True):
        value.name = name
    _find_uses(traced, quantizers)
    _separate(traced, model, what)
    if untie:
        _untie(traced, model, what)
    names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    names |= {value.name for value in graph.inputs}
    for use in traced.uses:
        if use.is_weight:
            _lay_out(use, graph)
        else:
            _name_source(use, graph, names)
    traced.model.opset_imports.pop(_DOMAIN, None)
    return traced


# ---- what is traced ------------------------------------------------------------------------------


class _Call(nn.Module):
    """A model as a function of tensors alone, its `inputs` by name, which returns tensors alone.

    given: all arguments, in order; by position or by name.
    """

    def __init__(self, model: nn.Module, given: dict[str, Any], by_position: bool):
        super().__init__()
        self.model, self.names, self.by_position = model, list(given), by_position
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        self.inputs = {name: x.detach().contiguous() for name, x in tensors.items()}
        self.constants = {name: x for name, x in given.items() if name not in tensors}
        self.returned = _Returned()
        of_transformers = any(True for _ in pretrained_models(model))
        known = "use_cache" in inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if of_transformers and known else {}

    def forward(self, *tensors: Tensor):
        given = self.constants | dict(zip(self.inputs, tensors, strict=True))
        if self.by_position:
            result = self.model(*(given[name] for name in self.names), **self.options)
        else:
            result = self.model(**given | self.options)
        if isinstance(result, Mapping):
            logits = result.get("logits")
            result = logits if logits is not None else next(iter(result.values()))
            self.returned.name = "output" if logits is None else "logits"
        return result


class _Returned:
    """Beside the module, whose attributes a trace must leave alone."""

    name = "output"


def _call(model: nn.Module, example: Any, what: str) -> _Call:
    """The model with the arguments of an example, by the names that its forward gives them."""
    if isinstance(example, Tensor):
        example = (example,)
    if isinstance(example, tuple):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(model.forward).parameters
        names = [name for name, p in parameters.items() if p.kind in kinds]
        names += [f"input_{i}" for i in range(len(names), len(example))]
        given = dict(zip(names, example, strict=False))
    elif isinstance(example, Mapping):
        given = dict(example)
    else:
        raise ValueError(
            f"{what}: example_inputs must be a tensor, a tuple of positional arguments or a dict "
            f"of keyword arguments, got {type(example).__name__}"
        )
    call = _Call(model, given, isinstance(example, tuple))
    if not call.inputs:
        raise ValueError(f"{what}: example_inputs holds no tensor")
    return call


def _not_single(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with two elements along a dynamic axis of one, which torch.export would keep."""
    return {
        name: x.repeat([2 if axis in axes and n == 1 else 1 for axis, n in enumerate(x.shape)])
        for (name, x), axes in zip(inputs.items(), _shapes(inputs)[0], strict=True)
    }


def _shapes(inputs: dict[str, Tensor]) -> tuple[tuple[dict[int, Any], ...]]:
    """The dynamic axes of each input, as the one argument *tensors of `_Call` has them."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    return (
        tuple(
            ({0: batch} if x.dim() else {})
            | ({1: length} if name in _OF_TOKENS and x.dim() > 1 else {})
            for name, x in inputs.items()
        ),
    )


@contextmanager
def _standing_for(quantizers: Mapping[str, Quantizer]) -> Iterator[None]:
    """Each quantizer's call becomes a node of its own."""
    own = {q: vars(q)["forward"] for q in quantizers.values() if "forward" in vars(q)}
    for name, quantizer in quantizers.items():
        quantizer.forward = _node_for(name, quantizer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            del quantizer.forward
        for quantizer, forward in own.items():
            quantizer.forward = forward  # type: ignore[method-assign]


def _node_for(name: str, quantizer: Quantizer):
    def forward(x: Tensor) -> Tensor:
        blocks = [int(size) for size in quantizer.shape_on(x)]
        attributes: dict[str, Any] = {"name": name, "blocks": blocks}
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::Quantizer", (x,), attributes, dtype=x.dtype, shape=x.shape, version=1
        )

    return forward


@contextmanager
def _one_implementation(model: nn.Module) -> Iterator[None]:
    """Experts of transformers by the implementation that ONNX has operators for."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    name = "_experts_implementation_internal"
    before = [(c, vars(c)[name]) for c in configs.values() if name in getattr(c, "__dict__", ())]
    for config, _ in before:
        setattr(config, name, "batched_mm")
    try:
        yield
    finally:
        for config, implementation in before:
            setattr(config, name, implementation)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of packages that are not there and of names of axes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What the innermost cause says, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 400 else f"{text[:400]} ..."


# ---- names and layouts ---------------------------------------------------------------------------


def _name_parameters(graph: ir.Graph, model: nn.Module) -> None:
    """Parameters are called as in the model itself, those with several names by the first."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    for old, value in list(graph.initializers.items()):
        own = names.get(old.removeprefix("model."))
        if own is not None and own not in graph.initializers:
            value.name = own


def _names_of_outputs(call: _Call, count: int) -> list[str]:
    first = call.returned.name
    return [first, *(f"{first}_{i}" for i in range(1, count))]


def _find_uses(traced: Traced, quantizers: Mapping[str, Quantizer]) -> None:
    """Collects the nodes that stand for quantizers, one for each tensor."""
    graph = traced.model.graph
    first: dict[tuple[str, int], Use] = {}
    for node in list(graph):
        if node.domain != _DOMAIN:
            continue
        name, blocks = node.attributes["name"].as_string(), node.attributes["blocks"].as_ints()
        use = Use(node, name, quantizers[name], tuple(blocks), False)
        use.is_weight = use.source.is_initializer()
        kept = first.setdefault((name, id(use.source)), use)
        if kept is use:
            traced.uses.append(use)
        else:
            use.result.replace_all_uses_with(kept.result)
            graph.remove(node, safe=True)


def _separate(traced: Traced, model: nn.Module, what: str) -> None:
    """Gives each quantizer the constant of its own weight, by name: the exporter makes one of equal
    weights, such as those of new norms."""
    users = weights_of_quantizers(model, what)
    taken = set()
    for use in [use for use in traced.uses if use.is_weight]:
        names = [weight.name for weight in users.get(use.quantizer, ())] or [f"{use.name}.weight"]
        if id(use.source) in taken or (use.quantizer in users and use.tensor not in names):
            use.node.replace_input_with(0, _copy(use.source, names[0], traced.model.graph))
        taken.add(id(use.source))


def _copy(constant: ir.Value, name: str, graph: ir.Graph) -> ir.Value:
    import onnx_ir as ir

    value = ir.Value(
        name=name, shape=constant.shape, type=constant.type, const_value=constant.const_value
    )
    graph.register_initializer(value)
    return value


def _untie(traced: Traced, model: nn.Module, what: str) -> None:
    """Gives each reader of a weight a use and an initializer, called after the layers in turn."""
    import onnx_ir as ir

    graph = traced.model.graph
    users = weights_of_quantizers(model, what)
    for use in [use for use in traced.uses if use.is_weight]:
        names = [weight.name for weight in users.get(use.quantizer, ())]
        for i, (reader, index) in enumerate(list(use.result.uses())[1:], 1):
            name = names[i] if i < len(names) else f"{use.tensor}_{i}"
            source = _copy(use.source, name, graph)
            node = ir.node("Quantizer", [source], dict(use.node.attributes), domain=_DOMAIN)
            node.outputs[0].shape, node.outputs[0].type = use.result.shape, use.result.type
            graph.insert_after(use.node, node)
            reader.replace_input_with(index, node.outputs[0])
            traced.uses.append(Use(node, use.name, use.quantizer, use.blocks, True))


def _lay_out(use: Use, graph: ir.Graph) -> None:
    """Transposes a constant matrix that matrix products alone read, and read transposed."""
    readers = [(node, index) for node, index in use.result.uses()]
    shape = use.source.shape
    if shape is None or len(shape) != 2 or use.result.is_graph_output() or not readers:
        return
    products = {
        node: node.op_type == "Gemm" and index == 1 and node.attributes.get_int("transB", 0) == 1
        for node, index in readers
    }
    transposes = [
        node
        for node in products
        if node.op_type == "Transpose"
        and tuple(node.attributes.get_ints("perm", ())) == (1, 0)
        and not node.outputs[0].is_graph_output()
    ]
    if len(transposes) + sum(products.values()) < len(products):
        if transposes:
            use.note = "one initializer for several layouts: a Transpose is left in the graph"
        return
    for node in products:
        if node.op_type == "Gemm":
            del node.attributes["transB"]
        else:
            node.outputs[0].replace_all_uses_with(use.result)
            graph.remove(node, safe=True)
    use.transposed = True
    if len(use.blocks) == 2:
        use.blocks = use.blocks[::-1]
    use.result.shape = type(shape)(list(shape)[::-1])


def _name_source(use: Use, graph: ir.Graph, names: set[str | None]) -> None:
    """Calls what is quantized after its quantizer. What has a name already, or others read as it
    is, keeps it, and an Identity gets the new one."""
    import onnx_ir as ir

    name = use.name.removesuffix("_quantizer") or use.quantizer.label
    numbered = (name if i == 0 else f"{name}_{i}" for i in range(len(names) + 1))
    name = next(candidate for candidate in numbered if candidate not in names)
    names.add(name)
    source, made = use.source, use.source.producer()
    readers = [node for node, _ in source.uses() if node.op_type != "Shape"]
    if made is None or made.domain == _DOMAIN or source.is_graph_output() or len(readers) > 1:
        identity = ir.node("Identity", [source])
        identity.outputs[0].shape, identity.outputs[0].type = source.shape, source.type
        graph.insert_before(use.node, identity)
        use.node.replace_input_with(0, identity.outputs[0])
        source = identity.outputs[0]
    source.name = name
