"""Weights whose codes swing to and fro, and holding them still.

"Overcoming Oscillations in Quantization-Aware Training" (Nagel, Fournarakis, Bondarenko,
Blankevoort; arXiv 2203.11086).
"""

from __future__ import annotations

import functools
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from asymq import ops
from asymq._arguments import is_number
from asymq.training.codes import CodedWeight, coded_weights

_WHAT = "asymq.OscillationObserver"
# `last` of a held weight, whose changes of code are over.
_HELD = 2


class OscillationObserver:
    """Finds the weights whose codes oscillate, and holds them.

    Late in training a latent weight sits at a transition point, and its code goes to and fro
    however small the learning rate is. Of the code c of each weight, as `asymq.quantize` gives it
    with the present range, at step t = 1, 2, ...:

        Δ = c_t - c_(t-1)
        o = 1 where Δ != 0 and sign(Δ) = -sign(the last Δ that was not 0), else 0
        f <- m·f + (1 - m)·o, from 0 on               frequency, section 3.2 of the paper
        C <- m·C + (1 - m)·c_t, from c_0 on           running mean of the code

    `freeze` holds every weight with f above a threshold at s·(rint(C) + rint(z)), where s and z are
    the present scale and offset (z = 0 where the range is symmetric): at the code where it was most
    of the time (iterative weight freezing, the paper's algorithm 1). At the end of each step of any
    torch optimizer what is held is put back, so that neither momentum nor weight decay moves it,
    its code stays as the range learns, and a TransitionRateScheduler counts no change, whichever
    `step` is called first. It is held for good: its o is 0 from then on, so that f fades.

        observer = asymq.OscillationObserver(model)
        ...
        optimizer.step()
        observer.step()
        observer.freeze(threshold)  # in each step; the paper lowers it from 0.04 to 0.01

    Observed is every weight with a weight quantizer that requires grad, from the values that it has
    when this is made.

    momentum: m, in [0, 0.999].

    An element costs its code (a byte up to 8 bits), a byte for the sign of its last change or that
    it is held, and float16 for f and for C - c, whose distance float16 can follow with any number
    of bits. Of weights that FSDP2 has split each process observes its own part. Nothing waits for
    the device, and `step` and `freeze` can be captured in a CUDA graph.

    ValueError: momentum outside what is said above; no quantized weight that requires grad; a
    weight quantizer that is not calibrated, or whose range is dynamic: a held weight would move
    with its neighbours.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.99):
        if not (is_number(momentum) and 0 <= momentum <= 0.999):
            raise ValueError(f"{_WHAT}: momentum must be from 0 to 0.999, got {momentum!r}")
        weights = [w for w in coded_weights(model) if w.parameter.requires_grad]
        if not weights:
            raise ValueError(f"{_WHAT}: the model has no quantized weights that require grad")
        for weight in weights:
            _check(weight)
        self._momentum = momentum
        self._weights = {weight.name: _Observed(weight) for weight in weights}
        self._holds = False  # whether `freeze` has been called: until then nothing is put back
        _watch()
        _OBSERVERS.add(self)

    @property
    def frequency(self) -> dict[str, Tensor]:
        """f by name of the weight: float16, of its shape, and of a split one of this process's
        part. They are the observer's own, which go on changing."""
        return {name: one.frequency for name, one in self._weights.items()}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Which elements are held, by name of the weight: bool, of the shape of its frequency."""
        return {name: one.held for name, one in self._weights.items()}

    def share(self, threshold: float) -> Tensor:
        """The share of all observed elements with f above `threshold`, on all processes of split
        weights: float64, 0-d, on the first weight's device. ValueError: it is no finite number."""
        if not is_number(threshold):
            raise ValueError(f"{_WHAT}.share: threshold must be a number, got {threshold!r}")
        counts: dict[tuple, Tensor] = {}
        device = next(iter(self._weights.values())).codes.device
        for one in self._weights.values():
            count = (one.frequency > threshold).sum().to(device, non_blocking=True)
            groups = one.weight.process_groups
            counts[groups] = counts[groups] + count if groups in counts else count
        for groups, count in counts.items():
            for group in groups:
                torch.distributed.all_reduce(count, group=group)
        elements = sum(one.weight.parameter.numel() for one in self._weights.values())
        return torch.stack(list(counts.values())).sum().double() / elements

    @torch.no_grad()
    def step(self) -> None:
        """Once after each optimizer.step(): observes what it changed. A call without it is a step
        that changed nothing."""
        for one in self._weights.values():
            one.observe(self._momentum)

    @torch.no_grad()
    def freeze(self, threshold: float) -> None:
        """Holds the weights with f above `threshold`, between 0 and 1, besides those that are held
        already. ValueError: another threshold."""
        if not (is_number(threshold) and 0 < threshold < 1):
            raise ValueError(
                f"{_WHAT}.freeze: threshold must be between 0 and 1, got {threshold!r}"
            )
        self._holds = True
        for one in self._weights.values():
            one.freeze(threshold)
            one.put_back()

    def state_dict(self) -> dict:
        """Tensors and values that torch.load opens with weights_only=True; of split weights, of
        this process's part."""
        weights = {
            name: {key: tensor.clone() for key, tensor in one.state().items()}
            for name, one in self._weights.items()
        }
        return {"holds": self._holds, "weights": weights}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where the observer was that gave this state. ValueError, before anything is
        changed: it observed other weights."""
        found = state.get("weights", {})
        kinds = {
            name: {key: (t.shape, t.dtype) for key, t in tensors.items()}
            for name, tensors in found.items()
        }
        own = {
            name: {key: (t.shape, t.dtype) for key, t in one.state().items()}
            for name, one in self._weights.items()
        }
        if kinds != own:
            different = [n for n in {**own, **kinds} if own.get(n) != kinds.get(n)]
            raise ValueError(
                f"{_WHAT}: the state is of other weights, or of other parts of them: "
                f"{', '.join(different)}; load it into an observer of the same model"
            )
        self._holds = state["holds"]
        for name, one in self._weights.items():
            for key, tensor in one.state().items():
                tensor.copy_(found[name][key])


class _Observed:
    """What is known of a weight. codes: as of the last step, of a held element the one at which it
    is held. last: the sign of the last change, 0 before the first, or _HELD. deviation: C - c."""

    def __init__(self, weight: CodedWeight):
        self.weight = weight
        with torch.no_grad():
            self.codes = weight.codes()
        self.last = torch.zeros_like(self.codes, dtype=torch.int8)
        self.frequency = torch.zeros_like(self.codes, dtype=torch.float16)
        self.deviation = torch.zeros_like(self.frequency)

    @property
    def held(self) -> Tensor:
        return self.last == _HELD

    def state(self) -> dict[str, Tensor]:
        names = ("codes", "last", "frequency", "deviation")
        return {name: getattr(self, name) for name in names}

    def observe(self, momentum: float) -> None:
        wide = torch.int16 if self.codes.element_size() == 1 else torch.int32
        change = self.weight.codes().to(wide).sub_(self.codes)
        # A held element has its code even where the weight's dtype is too coarse for it.
        change.masked_fill_(self.held, 0)
        direction = change.sign().to(torch.int8)
        oscillates = direction * self.last == -1
        self.frequency.lerp_(oscillates.half(), 1 - momentum)
        torch.where(direction == 0, self.last, direction, out=self.last)
        self.codes.add_(change)
        # m·C + (1 - m)·c' - c' = m·(C - c - Δ), where Δ of 16 bits may be more than float16 has.
        largest = torch.finfo(torch.float16).max
        self.deviation.sub_(change.half().clamp_(-largest, largest)).mul_(momentum)

    def freeze(self, threshold: float) -> None:
        new = (self.frequency > threshold).logical_and_(~self.held)
        at = self.codes + self.deviation.round().to(torch.int32)
        torch.where(new, at.to(self.codes.dtype), self.codes, out=self.codes)
        self.last.masked_fill_(new, _HELD)

    def put_back(self) -> None:
        values, (scale, offset) = self.weight.values, self.weight.scale_offset()
        held = ops.dequantize(self.codes, scale, offset, **self.weight.options)
        torch.where(self.held, held.to(values.dtype), values, out=values)


def _check(weight: CodedWeight) -> None:
    quantizer = weight.quantizer
    if not quantizer.calibrated:
        raise ValueError(
            f"{_WHAT}: the range of {quantizer.label} is not set; calibrate the model first"
        )
    if quantizer.live:
        raise ValueError(
            f"{_WHAT}: the range of {quantizer.label} is dynamic, and would move what is held with "
            "its neighbours; give it a static range"
        )
    try:
        weight.need_plain_shard()
    except ValueError as error:
        raise ValueError(f"{_WHAT}: {error}") from None


_OBSERVERS: WeakSet[OscillationObserver] = WeakSet()


@functools.cache
def _watch() -> None:
    """Once in a process."""
    register_optimizer_step_post_hook(_put_back)


@torch.no_grad()
def _put_back(*_) -> None:
    """After every step of any optimizer: another may have moved the ranges."""
    for observer in list(_OBSERVERS):
        if observer._holds:
            for one in observer._weights.values():
                one.put_back()
