"""A model as a whole: its mode, what others put around it, models of transformers within it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn


class Wrapper(NamedTuple):
    title: str
    attribute: str  # where the model is


# By module and class, which are looked up where they are loaded already: importing them takes
# longer than asymq.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): Wrapper("torch.compile", "_orig_mod"),
    ("torch.nn", "DataParallel"): Wrapper("DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel"): Wrapper("DistributedDataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel"): Wrapper("AveragedModel", "module"),
}
_SHARDED = (
    ("torch.distributed.fsdp", "FSDPModule"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)


def _is(module: nn.Module, place: tuple[str, str]) -> bool:
    cls = getattr(sys.modules.get(place[0]), place[1], None)
    return cls is not None and isinstance(module, cls)


def wrapper_of(model: nn.Module) -> Wrapper | None:
    """What kind of wrapper of a whole model this is; None: none."""
    return next((wrapper for place, wrapper in _WRAPPERS.items() if _is(model, place)), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, whose names are those that `asymq.load` knows."""
    while (wrapper := wrapper_of(model)) is not None:
        model = getattr(model, wrapper.attribute)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP has taken it over."""
    return any(_is(module, place) for place in _SHARDED)


def pretrained_models(module: nn.Module) -> Iterator[nn.Module]:
    """The models of transformers that are this module or lie within it, but not within another."""
    if _is(module, ("transformers.modeling_utils", "PreTrainedModel")):
        yield module
        return
    for child in module.children():
        yield from pretrained_models(child)
