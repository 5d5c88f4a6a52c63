"""Range parameters and weights, as optimizers take them."""

from __future__ import annotations

import functools
import warnings
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from asymq._arguments import is_number
from asymq.quantizers import named_quantizers
from asymq.training.recommendations import rate_of_ranges


def _ranges(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, q in named_quantizers(model) for p in q.parameters(recurse=False)]


def is_rate(lr: object) -> bool:
    """A learning rate as optimizers take it; a tensor's value is not read."""
    return isinstance(lr, Tensor) or (is_number(lr) and lr >= 0)


def range_parameters(model: nn.Module, lr: float | str | Tensor | None = None) -> list[dict]:
    """The learned ranges of a model as a list of optimizer parameter groups, without weight decay,
    which would shrink the ranges; those of specs with learn=False are left out. lr: their learning
    rate, a number or, for optimizers that take one, a tensor; None: the optimizer's own;
    "recommended": that of `recommended` for the recipe whose quantizers the model has, of Adam.

    ValueError: the model has none, or is to get a recommended rate and has no recipe's quantizers;
    an lr that is none of these, negative or not finite.
    """
    named = isinstance(lr, str) and lr == "recommended"
    if not (named or lr is None or is_rate(lr)):
        raise ValueError(
            "asymq.range_parameters: lr must be a finite number of at least 0, None (the "
            f'optimizer\'s own) or "recommended", got {lr!r}'
        )
    parameters = [
        p for _, q in named_quantizers(model) if q.spec.learn for p in q.parameters(recurse=False)
    ]
    if not parameters:
        raise ValueError("asymq.range_parameters: the model has no quantizers with learned ranges")
    group = {"params": parameters, "weight_decay": 0.0}
    if named:
        lr = rate_of_ranges(model)
    return [group if lr is None else {**group, "lr": lr}]


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of a model but its ranges, for groups that decay, or an optimizer of
    matrices such as Muon (which would take ranges of [out, 1] for matrices)."""
    ranges = {id(p) for p in _ranges(model)}
    return [p for p in model.parameters() if id(p) not in ranges]


def freeze_weight_ranges(model: nn.Module) -> None:
    """Stops the learned ranges of weights from learning, those of normalization layers' excepted.

    ValueError: the model has no quantized weights.
    """
    quantizers = [q for _, q in named_quantizers(model) if q.kind == "weight"]
    if not quantizers:
        raise ValueError("asymq.freeze_weight_ranges: the model has no quantized weights")
    for quantizer in quantizers:
        for parameter in quantizer.parameters(recurse=False):
            parameter.requires_grad_(False)


def freeze_weights(model: nn.Module) -> None:
    """Stops everything but the ranges from learning: no gradients of weights are computed."""
    for parameter in weight_parameters(model):
        parameter.requires_grad_(False)


# ---- optimizers that others make -----------------------------------------------------------------

_WATCHED: WeakSet[nn.Module] = WeakSet()
_SEEN: WeakSet[Optimizer] = WeakSet()


def warn_of_decay(model: nn.Module) -> None:
    """From now on, the first step of an optimizer that shrinks ranges of `model` warns, or that of
    one that takes them for matrices."""
    _watch()
    _WATCHED.add(model)


@functools.cache
def _watch() -> None:
    """Once in a process."""
    register_optimizer_step_pre_hook(_look_at)


def _look_at(optimizer: Optimizer, *_) -> None:
    if optimizer in _SEEN:
        return
    _SEEN.add(optimizer)
    ranges = {id(p) for model in _WATCHED for p in _ranges(model)}
    muon = "muon" in type(optimizer).__name__.lower()
    for group in optimizer.param_groups:
        count = sum(id(p) in ranges for p in group["params"])
        if count and (muon or group.get("weight_decay", 0)):
            harm = "takes for matrices" if muon else "shrinks by weight decay"
            warnings.warn(
                f"asymq: {type(optimizer).__name__} {harm} {count} learned ranges: give it "
                "asymq.weight_parameters(model), and asymq.range_parameters(model) as a group "
                "without decay or an optimizer of their own (of a Trainer: optimizers=(optimizer, "
                "None), or asymq.integrations.transformers.RangeTrainerMixin)",
                stacklevel=4,
            )
            return
