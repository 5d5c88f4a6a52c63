"""The paper's step rules, for any optimizer.

A rule is the parameterization it belongs to and, for one quantizer and the name of one of its
learned tensors, the factor of that tensor's step (section 3 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from asymq.quantizers import Quantizer, named_quantizers

# The rules of an optimizer.
_RULES: WeakKeyDictionary[Optimizer, list[StepRule]] = WeakKeyDictionary()


def _first_value(quantizer: Quantizer, name: str) -> Tensor:
    return getattr(quantizer, f"initial_{name}").abs()


def _current_value(quantizer: Quantizer, name: str) -> Tensor:
    return getattr(quantizer, name).detach().abs()


def _of_min_max(quantizer: Quantizer, name: str) -> Tensor:
    """What moves the range as a step of min and max would: 2/k for the scale, 1/s for the offset
    (the paper's equations 5 to 8)."""
    scale = quantizer.scale_offset()[0]
    return torch.full_like(scale, 2 / quantizer.spec.steps) if name == "scale" else 1 / scale


Factor = Callable[[Quantizer, str], Tensor]
STEP_RULES: dict[str, tuple[str, Factor]] = {
    "min_max_plus": ("min_max", _first_value),
    "naive": ("scale_offset", _first_value),
    "naive_current": ("scale_offset", _current_value),
    "sophisticated": ("scale_offset", _of_min_max),
}


class StepRule:
    """Hooks of an optimizer that scale its steps; `remove` takes them off."""

    def __init__(self, optimizer: Optimizer, rule: Factor, sites: list[tuple[Quantizer, str]]):
        self._rule, self._sites = rule, sites
        self._before: tuple[list[Tensor], list[Tensor]] = [], []
        self._siblings = _RULES.setdefault(optimizer, [])
        self._siblings.append(self)
        self._handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._scale),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self in self._siblings:
            self._siblings.remove(self)

    def scales(self, parameter: Tensor) -> bool:
        return any(p is parameter for p in self._parameters())

    def _parameters(self) -> list[Tensor]:
        return [getattr(quantizer, name) for quantizer, name in self._sites]

    @torch.no_grad()
    def _remember(self, *_) -> None:
        factors = [self._rule(quantizer, name) for quantizer, name in self._sites]
        self._before = [p.clone() for p in self._parameters()], factors

    @torch.no_grad()
    def _scale(self, *_) -> None:
        values, factors = self._before
        parameters = self._parameters()
        # value + factor·(stepped - value), in a few launches for all of them.
        torch._foreach_sub_(parameters, values)
        torch._foreach_mul_(parameters, factors)
        torch._foreach_add_(parameters, values)


def attach_step_rule(optimizer: Optimizer, model: nn.Module, rule: str) -> StepRule:
    """Multiplies every step of the range parameters per element, whatever the optimizer.

    rule: "min_max_plus" (min/max: the calibrated |θ|), "naive" (scale/offset: their first |s| and
    |z|), "naive_current" (their present ones), "sophisticated" (2/k and 1/s). The step is scaled,
    not the gradient, whose factors Adam would cancel.

    ValueError: an unknown rule; none of the model's ranges in the optimizer; one in it that has
    another parameterization, is not calibrated, or has a rule of this optimizer's already.
    """
    what = "asymq.attach_step_rule"
    if rule not in STEP_RULES:
        raise ValueError(f"{what}: unknown rule {rule!r}; there are {', '.join(STEP_RULES)}")
    parameterization, factor = STEP_RULES[rule]
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    sites = []
    for name, quantizer in named_quantizers(model):
        learned = [n for n in quantizer.learned if id(getattr(quantizer, n)) in optimized]
        if not learned:
            continue
        if quantizer.spec.parameterization != parameterization:
            raise ValueError(
                f"{what}: {rule} belongs to {parameterization}, but {name} learns "
                f"{quantizer.spec.parameterization}"
            )
        if not quantizer.calibrated:
            raise ValueError(f"{what}: {name} has no first values yet; calibrate the model first")
        parameters = [getattr(quantizer, n) for n in learned]
        if any(one.scales(p) for one in _RULES.get(optimizer, ()) for p in parameters):
            raise ValueError(
                f"{what}: the optimizer scales the steps of {name} already; remove() that rule "
                "first"
            )
        sites += [(quantizer, n) for n in learned]
    if not sites:
        raise ValueError(f"{what}: the optimizer has none of the model's range parameters")
    return StepRule(optimizer, factor, sites)
