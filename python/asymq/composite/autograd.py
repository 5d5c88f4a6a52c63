"""Differentiation of the private operators: each has a backward operator of its own, which takes
the same arguments, and of which there is no second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from asymq.composite.checks import NO_QUANTIZER, refusal, traits_of

_OPS = torch.ops.asymq
# Their results have no gradient.
_FALL_THROUGH = ("quantize", "dequantize", "_effective_scale_offset")
# Arguments that may ask for none.
_CONSTANT = {
    "mask": ", its gradient is not computed",
    "teacher_logits": ", its gradient is not computed: detach it",
}


class _Arguments:
    """Where the arguments of a call are in a row of them, lists of tensors opened, as autograd
    takes them. It holds no tensor: the graph would keep it alive."""

    def __init__(self, op: Any, values: Sequence, row: list):
        """row: an empty list, to which the values are added."""
        self.op = op
        self.places: dict[str, list[int]] = {}
        self.lists: set[str] = set()
        for argument, value in zip(op._schema.arguments, values, strict=True):
            if str(argument.type) == "List[Tensor]":
                self.lists.add(argument.name)
            else:
                value = [value]
            self.places[argument.name] = list(range(len(row), len(row) + len(value)))
            row += value

    def named(self, row: Sequence) -> dict[str, Any]:
        """The arguments by name, from a row."""
        return {
            name: [row[i] for i in places] if name in self.lists else row[places[0]]
            for name, places in self.places.items()
        }

    def quantizers(self, row: Sequence) -> list[tuple[int, list[int]]]:
        """Parameterization and places of the range tensors of every quantizer."""
        suffix, result = "parameterization", []
        for name in self.places:
            if not name.endswith(suffix):
                continue
            ranges = name.removesuffix(suffix) + "ranges"
            slots = [ranges] if ranges in self.places else ["first", "second", "min", "max"]
            places = [i for slot in slots for i in self.places.get(slot, ())]
            result.append((row[self.places[name][0]], [i for i in places if row[i] is not None]))
        return result


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arguments: _Arguments, *row):
        ctx.set_materialize_grads(False)
        # The call below shall reach a kernel, not this function again.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            results = arguments.op(*arguments.named(row).values())
        tensors = [value if torch.is_tensor(value) else None for value in row]
        if isinstance(results, tuple):
            ctx.mark_non_differentiable(results[1])
            tensors.append(results[1])
        ctx.save_for_backward(*tensors)
        ctx.arguments = arguments
        ctx.row = [None if torch.is_tensor(value) else value for value in row]
        return results

    @staticmethod
    def backward(ctx, grad, *_):
        arguments, count = ctx.arguments, len(ctx.row)
        gradients = [None] * count
        if grad is None:
            return None, *gradients
        tensors = ctx.saved_tensors
        row = [v if t is None else t for v, t in zip(ctx.row, tensors[:count], strict=True)]
        wanted = _learned(arguments, row)
        needs = [i is not None and ctx.needs_input_grad[1 + i] for i in wanted]
        values = arguments.named(row) | {"grad": grad, "needs": needs}
        values |= {"statistics": tensors[-1]} if len(tensors) > count else {}
        backward = _backward(arguments.op)
        results = backward(*(values[a.name] for a in backward._schema.arguments))
        for place, result in zip(wanted, results, strict=True):
            if place is not None:
                gradients[place] = result
        return None, *gradients


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arguments: _Arguments, *row):
        ctx.name = arguments.op._schema.name
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return arguments.op(*arguments.named(row).values())

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"derivative for {ctx.name} is not implemented")


def _backward(op: Any) -> Any:
    return getattr(_OPS, f"{op._schema.name.removeprefix('asymq::')}_backward").default


def _learned(arguments: _Arguments, row: list) -> list[int | None]:
    """Where in the row is what the results of the backward operator are the gradients of: its
    first tensors, then the first and the second of every quantizer; None where there is none."""
    quantizers = arguments.quantizers(row)
    tensors = len(_backward(arguments.op)._schema.returns) - 2 * len(quantizers)
    places: list[int | None] = list(range(tensors))
    for parameterization, ranges in quantizers:
        exists = parameterization != NO_QUANTIZER
        count = len(traits_of(parameterization).learned) if exists else 0
        places += [*ranges[:count], *[None] * (2 - count)]
    return places


def _check(arguments: _Arguments, row: list) -> None:
    """RuntimeError where the operator cannot be differentiated as it is called."""
    name = arguments.op._schema.name.removeprefix("asymq::_")
    for number, ranges in arguments.quantizers(row):
        if number == NO_QUANTIZER:
            continue
        traits = traits_of(number)
        own = name.startswith("fake_quantize")
        where = f"{name}_{traits.name}" if own else f"{name}: {traits.name}"
        _check_transforms(where if own else name)
        for fixed, place in zip(traits.fixed, ranges[len(traits.learned) :], strict=False):
            if row[place].requires_grad:
                why = "it is a constant of this parameterization"
                raise refusal(where, f"{fixed} must not require grad: {why}")
    _check_transforms(name)
    for constant, why in _CONSTANT.items():
        tensor = row[arguments.places[constant][0]] if constant in arguments.places else None
        if tensor is not None and tensor.requires_grad:
            raise refusal(name, f"{constant} must not require grad{why}")


def _check_transforms(where: str) -> None:
    if torch._C._are_functorch_transforms_active():
        raise refusal(
            where,
            "torch.func cannot differentiate this operator: give a model plain PyTorch by "
            'asymq.use_functions("reference"), call asymq.reference.fake_quantize_*, or take '
            "torch.autograd.grad",
        )


def kernels(names: Iterable[str]) -> dict[str, Callable]:
    """What the operators of these names do for autograd."""
    result = {name: torch.library.fallthrough_kernel for name in _FALL_THROUGH}
    for name in names:
        if name.startswith("_") and name not in result:
            function = _NoDerivative if name.endswith("_backward") else _Operator
            result[name] = _kernel(getattr(_OPS, name).default, function)
    return result


def _kernel(op: Any, function: type[torch.autograd.Function]) -> Callable:
    def call(*values):
        row: list = []
        arguments = _Arguments(op, values, row)
        if function is _Operator:
            _check(arguments, row)
        return function.apply(arguments, *row)

    return call
