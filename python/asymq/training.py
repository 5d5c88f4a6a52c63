"""What an optimizer needs: the range parameters, frozen weights, and the paper's step rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from asymq.quantizer import Quantizer, named_quantizers

T = TypeVar("T")


def range_parameters(model: nn.Module, lr: float | None = None) -> list[dict]:
    """The learned ranges of a model as a list of optimizer parameter groups, without weight decay,
    which would shrink the ranges. lr: their learning rate, None: the optimizer's own.

    ValueError: the model has none.
    """
    parameters = [p for _, q in named_quantizers(model) for p in q.parameters(recurse=False)]
    if not parameters:
        raise ValueError("asymq.range_parameters: the model has no quantizers with learned ranges")
    group = {"params": parameters, "weight_decay": 0.0}
    return [group if lr is None else {**group, "lr": lr}]


def freeze_weights(model: nn.Module) -> None:
    """Stops everything but the ranges from learning: no gradients of weights are computed."""
    ranges = {id(p) for _, q in named_quantizers(model) for p in q.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in ranges:
            parameter.requires_grad_(False)


def capture_step(step: Callable[[], T], warmup: int = 3) -> Callable[[], T]:
    """Captures a whole training step in a CUDA graph: what a small model's step costs is launches.

    step: forward, backward and optimizer step on tensors that stay where they are (copy each batch
    into them), with an optimizer made with capturable=True, `zero_grad()` first, and nothing that
    reads a GPU's value, as `item()` does. It is called `warmup` times, which train as any step, and
    recorded once, which does not. The function returned repeats it, and what it returns is
    overwritten by the next call.

    RuntimeError: there is no GPU. torch's errors where a step cannot be captured.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("asymq.capture_step: needs a CUDA GPU, and torch sees none")
    # Work before a capture belongs on the stream of its kind, so that no allocation is shared.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> T:
        graph.replay()
        return result

    return replay


# ---- step rules --------------------------------------------------------------------------------
#
# A rule is the parameterization it belongs to and, for one quantizer and the name of one of its
# learned tensors, the factor of that tensor's step (section 3 of the paper).


def _first_value(quantizer: Quantizer, name: str) -> Tensor:
    return getattr(quantizer, f"initial_{name}").abs()


def _current_value(quantizer: Quantizer, name: str) -> Tensor:
    return getattr(quantizer, name).detach().abs()


def _of_min_max(quantizer: Quantizer, name: str) -> Tensor:
    """What moves the range as a step of min and max would: 2/k for the scale, 1/s for the offset
    (the paper's equations 5 to 8)."""
    scale = quantizer.scale_offset()[0]
    return torch.full_like(scale, 2 / quantizer.spec.steps) if name == "scale" else 1 / scale


STEP_RULES: dict[str, tuple[str, Callable[[Quantizer, str], Tensor]]] = {
    "min_max_plus": ("min_max", _first_value),
    "naive": ("scale_offset", _first_value),
    "naive_current": ("scale_offset", _current_value),
    "sophisticated": ("scale_offset", _of_min_max),
}


class StepRule:
    """Hooks of an optimizer that scale its steps; `remove` takes them off."""

    def __init__(self, optimizer: Optimizer, rule: Callable, sites: list[tuple[Quantizer, str]]):
        self._rule, self._sites = rule, sites
        self._before: tuple[list[Tensor], list[Tensor]] = [], []
        self._handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._scale),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

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
    another parameterization or is not calibrated.
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
        sites += [(quantizer, n) for n in learned]
    if not sites:
        raise ValueError(f"{what}: the optimizer has none of the model's range parameters")
    return StepRule(optimizer, factor, sites)
