"""FSDP2 for models with learned ranges."""

from __future__ import annotations

from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable

from asymq.quantizers import Quantizer, is_split, named_quantizers

# Whose gradients are averaged, so that nobody does it twice.
_AVERAGED: WeakSet[Quantizer] = WeakSet()


def shard(module: nn.Module, **fully_shard_kwargs):
    """torch's ``fully_shard`` of a prepared model, or of a part of it, with the ranges left whole
    in float32 on every process and their gradients averaged, as those of the weights are.

    Call it as fully_shard: on the blocks first, then on the model, before the optimizer is made.
    fully_shard_kwargs: what fully_shard takes. RuntimeError: ranges that fully_shard has split
    already.
    """
    from torch.distributed.fsdp import fully_shard  # takes longer to import than asymq

    quantizers = [quantizer for _, quantizer in named_quantizers(module)]
    for quantizer in quantizers:
        quantizer.need_whole()
    ranges = {p for quantizer in quantizers for p in quantizer.parameters(recurse=False)}
    ignored = set(fully_shard_kwargs.pop("ignored_params", None) or ()) | ranges
    sharded = fully_shard(module, ignored_params=ignored, **fully_shard_kwargs)
    # It moves what it splits to the processes' device: the ranges belong there, too.
    device = next((p.device for p in module.parameters() if is_split(p)), None)
    for quantizer in quantizers if device is not None else ():
        quantizer.to(device)
    new = [quantizer for quantizer in quantizers if quantizer not in _AVERAGED]
    _AVERAGED.update(new)
    _Average([p for q in new for p in q.parameters(recurse=False)], fully_shard_kwargs.get("mesh"))
    return sharded


class _Average:
    """Averages the gradients of some parameters over the processes, at the end of each backward
    that reaches one of them: all in one message, in the same order everywhere."""

    def __init__(self, parameters: list[nn.Parameter], mesh=None):
        self._parameters, self._mesh = parameters, mesh
        self._waiting = False
        for parameter in parameters:
            # One that does not learn may do so later; torch hooks only those that do.
            learns = parameter.requires_grad
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._reached)
            parameter.requires_grad_(learns)

    def _reached(self, _) -> None:
        if not self._waiting:
            self._waiting = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._waiting = False
        learning = [p for p in self._parameters if p.requires_grad]
        # One that this process did not reach counts as 0: others may have.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        groups = [None] if self._mesh is None else self._mesh.get_all_groups()
        for group in groups:
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
        parts = flat.split([p.numel() for p in learning])
        for parameter, part in zip(learning, parts, strict=True):
            parameter.grad = part.view_as(parameter)
