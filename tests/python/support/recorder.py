"""asymq.reference as a module's functions, keeping what a gradient's tolerance needs."""

from __future__ import annotations

import torch
from compare import gather, spread
from torch import Tensor

from asymq import reference


class Recorder:
    """The functions of asymq.reference, which remember their calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        function = getattr(reference, name)

        def call(x: Tensor, *ranges: Tensor, **options) -> Tensor:
            y = function(x, *ranges, **options)
            if y.requires_grad:
                y.retain_grad()
                self.calls.append((function, x.detach(), ranges, options, y))
            return y

        return call

    def terms(self, parameter: Tensor) -> Tensor:
        """Σ|terms| of a range parameter's gradient, in its shape and float64."""
        total = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        for function, x, ranges, options, y in self.calls:
            places = [i for i, r in enumerate(ranges) if r.data_ptr() == parameter.data_ptr()]
            if not places or y.grad is None:
                continue
            # With a range of its own for every element, each "sum" is one term.
            own = [spread(r.detach(), x.shape) for r in ranges]
            own[places[0]].requires_grad_()
            (term,) = torch.autograd.grad(function(x, *own, **options), own[places[0]], y.grad)
            total += gather(term.abs(), ranges[places[0]].shape).reshape(parameter.shape)
        return total
