"""Learning rates that follow the share of codes that change in a step.

"Scheduling Weight Transitions for Quantization-Aware Training" (Lee, Jeon, Kim, Ham;
arXiv 2404.19248).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, AdamW, Optimizer

from asymq._arguments import is_integer, is_number
from asymq.quantizers import is_split
from asymq.training.codes import CodedWeight, Counter, coded_weights

_WHAT = "asymq.TransitionRateScheduler"
_SCHEDULED: WeakSet[Optimizer] = WeakSet()

RULES = ("multiplicative", "additive")
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda x: (1 + torch.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "constant": torch.ones_like,
}


class TransitionRateScheduler:
    """Sets the share of a weight's codes that change in a step, and lets its learning rate follow.

    A quantized weight changes only where it crosses a transition point, so the learning rate says
    little about how much a model changes. Of every scheduled weight, at step t = 1, 2, ...:

        k  = codes that the optimizer's step changed / elements                          (eq. 5)
        K <- m·K + (1 - m)·k, from R0 on                                                 (eq. 10)
        R  = R0·f(min(t/T, 1)) with R0 = factor·sqrt(bits)
        U <- max(0, U + gain·U0·(R - K))             rule "additive", eq. 11 with η = gain·U0
        U <- m·U + (1 - m)·U·R/(K + 1e-8)            rule "multiplicative", the authors' code
        U <- min(U, limit·U0)

    and the optimizer's next step has the rate U for this weight (eq. 12). U0, also the first
    step's, is the rate that the optimizer has when this is made. Scheduled is every weight with a
    weight quantizer that requires grad and is in the optimizer.

        asymq.freeze_weight_ranges(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rates = asymq.TransitionRateScheduler(optimizer, model, total_steps)
        ...
        optimizer.step()
        rates.step()

    optimizer: its groups are split: each scheduled weight gets one of its own, whose rate is this
        scheduler's; the order of parameters stays. Other parameters keep their rates and schedules:
        make LR schedulers after this, so that they know the groups. What they write as a scheduled
        weight's rate does not last.
    total_steps: T, an integer.
    factor: of the target, in (0, 1). momentum: m, in [0, 1); None: max(0.5, min(0.99, 1 - 50/T)).
    rule, gain, limit: see above. gain is of the additive rule alone; limit None: no bound.
    schedule: f, "cosine" (1 + cos πx)/2, "linear" 1 - x, "constant" 1, or a function of a 0-d
        float64 tensor on the weights' device.
    shared: one K and one U for all weights, with k over all elements, R0 the mean over elements and
        U0 that of the first weight.
    moving_ranges: allows weight ranges that learn or are dynamic. All changes of codes count then,
        also those that the range's move makes.

    What counts is the difference between two optimizer steps. The first codes are taken when the
    first step begins, and again after a load_state_dict of this or the optimizer, so that weights
    may be loaded in between. `step` without an optimizer step since the last does nothing, as
    after a step that a GradScaler left out.

    Nothing waits for the device, and a step with this can be captured in a CUDA graph, where the
    optimizer takes its rate as a tensor without reading it: with fused=True (Adam, AdamW, SGD,
    Adagrad) or capturable=True (Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, ASGD, RMSprop, Rprop).
    On the CPU torch's other optimizers have a tensor, too (tried: SGD, Adafactor, Muon). Elsewhere
    the rate is a float, written at each step, for which the host waits.

    Weights that FSDP2 has split: each process counts in its own part, and one message a step adds
    the counts up, so that all have the rates that one process would find. DDP needs nothing.

    ValueError: an argument outside what is said above; an LR scheduler made before this; an
    optimizer that has such a scheduler already, splits into no groups (LBFGS) or refuses a tensor
    (Adam with foreach=True and without capturable=True); none of the model's quantized weights in
    the optimizer; a weight quantizer that is not calibrated; a weight range that moves.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        total_steps: int,
        *,
        factor: float = 5e-3,
        momentum: float | None = None,
        rule: str = "multiplicative",
        gain: float = 1.0,
        schedule: str | Callable[[Tensor], Tensor] = "cosine",
        shared: bool = False,
        moving_ranges: bool = False,
        limit: float | None = 10.0,
    ):
        _need(rule in RULES, f"unknown rule {rule!r}; there are {', '.join(RULES)}")
        _need(
            callable(schedule) or schedule in SCHEDULES,
            f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}, or a function",
        )
        _need(
            is_integer(total_steps) and total_steps >= 1,
            f"total_steps must be an integer of at least 1, got {total_steps!r}",
        )
        _need(
            is_number(factor) and 0 < factor < 1, f"factor must be between 0 and 1, got {factor!r}"
        )
        if momentum is None:
            momentum = max(0.5, min(0.99, 1 - 50 / total_steps))
        _need(
            is_number(momentum) and 0 <= momentum < 1,
            f"momentum must be at least 0 and below 1, got {momentum!r}",
        )
        _need(is_number(gain) and gain > 0, f"gain must be positive and finite, got {gain!r}")
        _need(
            limit in (None, math.inf) or (is_number(limit) and limit > 0),
            f"limit must be positive, or None for no bound, got {limit!r}",
        )

        optimizer = _unwrapped(optimizer)
        _check_optimizer(optimizer)
        weights = _weights(optimizer, model)
        _check_ranges(weights, moving_ranges)
        _check_groups(optimizer, weights)

        self._optimizer, self._weights, self._counter = optimizer, weights, Counter(weights)
        self._total_steps, self._momentum = int(total_steps), momentum
        self._rule, self._gain, self._shared, self._limit = rule, gain, shared, limit
        self._schedule = schedule if callable(schedule) else SCHEDULES[schedule]

        _split(optimizer, weights)
        groups = self._groups()
        rates = [float(group["lr"]) for group in groups]
        sizes = [weight.parameter.numel() for weight in weights]
        targets = [factor * weight.quantizer.spec.bits**0.5 for weight in weights]
        if shared:
            total = sum(sizes)
            targets = [sum(r * n for r, n in zip(targets, sizes, strict=True)) / total]
            sizes, rates = [total], rates[:1]

        def tensor(values):
            device = weights[0].parameter.device
            return torch.tensor(values, dtype=torch.float64, device=device)

        self._sizes, self._first_targets = tensor(sizes), tensor(targets)
        # Not of no dimensions: torch 2.11's compiler loses what is copied to such a tensor.
        self._step = tensor([0.0])
        self._first_rates, self._rates = tensor(rates), tensor(rates)
        self._running, self._changed = tensor(targets), torch.zeros_like(self._rates)
        self._targets = self._target(self._step)
        self._make_lrs(groups)
        self._publish()

        self._started = self._stepped = False
        self._found_inf: Tensor | None = None
        # Out of a compiled optimizer.step, which has a graph break behind its hooks anyway.
        optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step))
        optimizer.register_step_post_hook(torch.compiler.disable(self._after_step))
        optimizer.register_load_state_dict_post_hook(self._after_load)
        _SCHEDULED.add(optimizer)

    # ---- what it knows -------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the scheduled weights, in the order of the optimizer's groups."""
        return [weight.name for weight in self._weights]

    @property
    def transition_rate(self) -> Tensor:
        """k of each weight: float64, [weights], or [1] if shared, on the weights' device."""
        return self._changed.clone()

    @property
    def running_rate(self) -> Tensor:
        """K of each weight, as transition_rate."""
        return self._running.clone()

    @property
    def target_rate(self) -> Tensor:
        """R of each weight, as transition_rate."""
        return self._targets.clone()

    @property
    def learning_rate(self) -> Tensor:
        """U of each weight, as transition_rate: the next step's rate."""
        return self._rates.clone()

    def state_dict(self) -> dict:
        """Tensors and names; torch.load opens it with weights_only=True. Neither codes, which
        weights and ranges say, nor what the constructor was given but for the first rates."""
        return {"names": self.names, **{k: t.clone() for k, t in self._state().items()}}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where the scheduler was that gave the state. ValueError: it had other weights."""
        own = self._state()
        if state.get("names") != self.names or any(
            key not in state or state[key].shape != own[key].shape for key in own
        ):
            raise ValueError(
                f"{_WHAT}: the state is of other weights or another `shared`: it has "
                f"{state.get('names')}, this scheduler {self.names}"
            )
        for key, tensor in own.items():
            tensor.copy_(state[key])
        self._started = self._stepped = False
        self._publish()

    def _state(self) -> dict[str, Tensor]:
        return {
            "step": self._step[0],
            "transition_rate": self._changed,
            "running_rate": self._running,
            "target_rate": self._targets,
            "learning_rate": self._rates,
            "first_learning_rate": self._first_rates,
        }

    # ---- a step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """After optimizer.step(): counts the codes that it changed and sets the next step's
        rates."""
        if not self._stepped:
            return
        self._stepped = False
        counts = self._counter.count().double()
        if self._shared:
            counts = counts.sum(0, keepdim=True)
        m, step = self._momentum, self._step + 1
        changed = counts / self._sizes
        running = m * self._running + (1 - m) * changed
        targets = self._target(step)
        if self._rule == "additive":
            rates = self._rates + self._gain * self._first_rates * (targets - running)
            rates = rates.clamp(min=0)
        else:
            rates = m * self._rates + (1 - m) * self._rates * targets / (running + 1e-8)
        if self._limit is not None:
            rates = torch.minimum(rates, self._limit * self._first_rates)
        old = [self._step, self._changed, self._running, self._targets, self._rates]
        new = [step, changed, running, targets, rates]
        if self._found_inf is not None:
            moved = self._found_inf.to(self._rates.device, non_blocking=True).reshape(()) == 0
            new = [torch.where(moved, n, o) for n, o in zip(new, old, strict=True)]
        for o, n in zip(old, new, strict=True):
            o.copy_(n)
        self._publish()

    def _target(self, step: Tensor) -> Tensor:
        return self._first_targets * self._schedule((step[0] / self._total_steps).clamp(max=1))

    def _before_step(self, *_) -> None:
        if self._is_probe():
            return
        if not self._started:
            self._counter.start()
            self._started = True
        self._write()

    def _after_step(self, optimizer: Optimizer, *_) -> None:
        if self._started:
            # A fused optimizer is told by a GradScaler, for as long as it steps, to move nothing.
            self._stepped, self._found_inf = True, getattr(optimizer, "found_inf", None)

    def _after_load(self, *_) -> None:
        self._started = self._stepped = False
        self._write()

    def _is_probe(self) -> bool:
        """Whether this is nobody's step: torch.distributed.checkpoint makes an optimizer create its
        state by a step with gradients and rates of 0."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        if optimizer.state or any(
            group["lr"] is lr for group, lr in zip(self._groups(), self._lrs, strict=True)
        ):
            return False
        if any(group["lr"] != 0 for group in groups):
            return False
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return not any((g.to_local() if is_split(g) else g).any() for g in gradients)

    # ---- the optimizer's groups ----------------------------------------------------------------

    def _groups(self) -> list[dict]:
        """Of the weights, as they are now: load_state_dict makes new ones."""
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        return [groups[id(weight.parameter)] for weight in self._weights]

    def _make_lrs(self, groups: list[dict]) -> None:
        """Tensors for the weights that have one, elements of few vectors, which are written whole,
        and None for the others."""
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        self._lrs: list[Tensor | None] = [None] * len(groups)
        for i, (weight, group) in enumerate(zip(self._weights, groups, strict=True)):
            if _takes_tensor(self._optimizer, group, weight):
                wide = weight.parameter.dtype == torch.float64 and not group.get("fused")
                dtype = torch.float64 if wide else torch.float32
                kinds.setdefault((weight.parameter.device, dtype), []).append(i)
        # (vector, which of the rates it holds; None: all)
        self._vectors: list[tuple[Tensor, Tensor | None]] = []
        for (device, dtype), places in kinds.items():
            vector = torch.empty(len(places), dtype=dtype, device=device)
            whole = self._shared or len(places) == len(groups)
            which = None if whole else torch.tensor(places, device=self._rates.device)
            self._vectors.append((vector, which))
            for place, lr in zip(places, vector.unbind(), strict=True):
                self._lrs[place] = lr

    @torch.no_grad()
    def _write(self) -> None:
        """Puts U into the optimizer's groups."""
        for vector, which in self._vectors:
            vector.copy_(self._rates if which is None else self._rates[which], non_blocking=True)
        for i, (group, lr) in enumerate(zip(self._groups(), self._lrs, strict=True)):
            group["lr"] = self._floats[0 if self._shared else i] if lr is None else lr

    def _publish(self) -> None:
        """After U has changed."""
        # Never `None in self._lrs`, which compares tensors.
        needs_floats = any(lr is None for lr in self._lrs)
        self._floats = self._rates.tolist() if needs_floats else []
        self._write()


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{_WHAT}: {what}")


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The one that steps, within accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _check_optimizer(optimizer: Optimizer) -> None:
    _need(optimizer not in _SCHEDULED, "the optimizer has such a scheduler already")
    _need(
        not hasattr(optimizer.step, "_wrapped_by_lr_sched"),
        "make the LR scheduler after this one, which changes the optimizer's groups",
    )
    _need(
        not isinstance(optimizer, LBFGS),
        "LBFGS has one rate for all parameters; use an optimizer that has groups",
    )


def _weights(optimizer: Optimizer, model: nn.Module) -> list[CodedWeight]:
    """In the order of the optimizer."""
    weights = {id(w.parameter): w for w in coded_weights(model) if w.parameter.requires_grad}
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    found = [weights[id(p)] for p in optimized if id(p) in weights]
    _need(bool(found), "the optimizer has none of the model's quantized weights that require grad")
    return found


def _check_ranges(weights: list[CodedWeight], moving_ranges: bool) -> None:
    for weight in weights:
        quantizer = weight.quantizer
        _need(
            quantizer.calibrated,
            f"the range of {quantizer.label} is not set; calibrate the model first",
        )
        learns = any(p.requires_grad for p in quantizer.parameters(recurse=False))
        _need(
            moving_ranges or not (quantizer.live or learns),
            f"the range of {quantizer.label} {'is dynamic' if quantizer.live else 'learns'}, and "
            "would change codes that no step of the weight moves: "
            + ("give it a static range and " if quantizer.live else "")
            + "call asymq.freeze_weight_ranges(model) first, or let all changes count with "
            "moving_ranges=True",
        )
        try:
            weight.need_plain_shard()
        except ValueError as error:
            raise ValueError(f"{_WHAT}: {error}") from None


def _check_groups(optimizer: Optimizer, weights: list[CodedWeight]) -> None:
    scheduled = {id(weight.parameter) for weight in weights}
    for group in optimizer.param_groups:
        refused = group.get("foreach") and not group.get("capturable")
        if isinstance(optimizer, (Adam, AdamW)) and refused:
            _need(
                not any(id(p) in scheduled for p in group["params"]),
                f"{type(optimizer).__name__} with foreach=True takes no tensor as its rate without "
                "capturable=True: give it that, or leave foreach out",
            )


def _takes_tensor(optimizer: Optimizer, group: dict, weight: CodedWeight) -> bool:
    """Whether the optimizer takes a tensor as this weight's rate and does not wait for a device to
    read it."""
    if group.get("fused") or group.get("capturable"):
        return True
    of_torch = type(optimizer).__module__.split(".")[:2] == ["torch", "optim"]
    return of_torch and weight.parameter.device.type == "cpu"


def _split(optimizer: Optimizer, weights: list[CodedWeight]) -> None:
    """Gives every weight a group of its own, with the options of the one that it was in; what is
    between two of them stays together."""
    scheduled = {id(weight.parameter) for weight in weights}
    groups = []
    for group in optimizer.param_groups:
        alone = [id(p) in scheduled for p in group["params"]]
        if not any(alone):
            groups.append(group)
            continue
        starts = [i for i, a in enumerate(alone) if a or i == 0 or alone[i - 1]]
        for first, end in zip(starts, [*starts[1:], len(alone)], strict=True):
            part = {**group, "params": group["params"][first:end]}
            if "param_names" in group:
                part["param_names"] = group["param_names"][first:end]
            groups.append(part)
    optimizer.param_groups[:] = groups
