"""Differentiation of the private operators: each has a backward operator of its own, which takes
the same arguments, and of which there is no second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asymq.composite.checks import NO_QUANTIZER, require, traits_of

_OPS = torch.ops.asymq
# Their results have no gradient.
_FALL_THROUGH = ("quantize", "dequantize", "_effective_scale_offset")
# Arguments that may ask for none.
_CONSTANT = {
    "mask": ", its gradient is not computed",
    "teacher_logits": ", its gradient is not computed: detach it",
}


class _Arguments:
    """The arguments of a call in one row, lists of tensors opened, as autograd takes them."""

    def __init__(self, op: Any, values: tuple):
        self.op = op
        self.row: list = []
        self.places: dict[str, int | list[int]] = {}
        for argument, value in zip(op._schema.arguments, values, strict=True):
            if str(argument.type) == "List[Tensor]":
                self.places[argument.name] = [len(self.row) + i for i in range(len(value))]
                self.row += value
            else:
                self.places[argument.name] = len(self.row)
                self.row.append(value)

    def named(self, row: tuple | list) -> dict[str, Any]:
        """The arguments by name, from a row."""
        return {
            name: [row[i] for i in place] if isinstance(place, list) else row[place]
            for name, place in self.places.items()
        }

    def quantizers(self, row: tuple | list) -> list[tuple[int, list[int]]]:
        """Parameterization and places of the range tensors of every quantizer."""
        suffix = "parameterization"
        whose = [name.removesuffix(suffix) for name in self.places if name.endswith(suffix)]
        result = []
        for prefix in whose:
            places = self.places.get(f"{prefix}ranges")
            if places is None:
                slots = (self.places.get(name) for name in ("first", "second", "min", "max"))
                places = [i for i in slots if i is not None and row[i] is not None]
            result.append((row[self.places[f"{prefix}{suffix}"]], places))
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


def _check(arguments: _Arguments) -> None:
    """RuntimeError where the operator cannot be differentiated as it is called."""
    row = arguments.row
    name = arguments.op._schema.name.removeprefix("asymq::_")
    for number, ranges in arguments.quantizers(row):
        if number == NO_QUANTIZER:
            continue
        traits = traits_of(number)
        own = name.startswith("fake_quantize")
        where = f"{name}_{traits.name}" if own else f"{name}: {traits.name}"
        _check_transforms(where if own else name)
        for fixed, place in zip(traits.fixed, ranges[len(traits.learned) :], strict=False):
            pieces = " must not require grad: it is a constant of this parameterization"
            require(not row[place].requires_grad, where, fixed, pieces)
    _check_transforms(name)
    for constant, why in _CONSTANT.items():
        tensor = row[arguments.places[constant]] if constant in arguments.places else None
        fits = tensor is None or not tensor.requires_grad
        require(fits, name, constant, " must not require grad", why)


def _check_transforms(where: str) -> None:
    pieces = 'asymq.use_functions("reference"), call asymq.reference.fake_quantize_*, or take '
    require(
        not torch._C._are_functorch_transforms_active(),
        *(where, "torch.func cannot differentiate this operator: give a model plain PyTorch by "),
        *(pieces, "torch.autograd.grad"),
    )


def kernel(name: str) -> Callable | None:
    """What the private operator of this name does for autograd; None: nothing of its own."""
    if name in _FALL_THROUGH:
        return torch.library.fallthrough_kernel
    if not name.startswith("_"):
        return None
    op = getattr(_OPS, name).default

    def differentiable(*values):
        arguments = _Arguments(op, values)
        _check(arguments)
        return _Operator.apply(arguments, *arguments.row)

    def not_differentiable(*values):
        arguments = _Arguments(op, values)
        return _NoDerivative.apply(arguments, *arguments.row)

    return not_differentiable if name.endswith("_backward") else differentiable
