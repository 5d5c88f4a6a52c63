"""`convert` takes the quantizers out of a model again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from asymq.layers import Quantized, quantized_parameters
from asymq.quantizers import Quantizer, elements, is_split, named_quantizers


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Takes every quantizer out, in place, and returns the plain model.

    Weights become their dequantized values, of their own dtype and still tied; activations are no
    longer quantized. Modules get their float classes back; a QuantAct that is a module of the
    user's own becomes an nn.Identity.

    Before anything is changed: RuntimeError if a weight's range is not set, ValueError if the model
    has no quantizers, is split among processes, or a tie of weights was broken.
    """
    quantizers = list(named_quantizers(model))
    if not quantizers:
        raise ValueError("asymq.convert: the model has no quantizers")
    if any(map(is_split, model.parameters())):
        raise ValueError(
            "asymq.convert: the model is split among processes; convert a whole one, such as "
            "asymq.load gives of what asymq.save writes"
        )
    if isinstance(model, Quantizer):
        raise ValueError("asymq.convert: a quantizer is no model")
    values = [
        (weight, quantizer.fake_quantize(weight))
        for quantizer, ((_, weight), *_) in weights_of_quantizers(model, "asymq.convert").items()
    ]
    for weight, value in values:
        weight.copy_(value)
    for module in list(model.modules()):
        while isinstance(module, Quantized):
            module.take_out()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Quantizer):
            model.set_submodule(name, nn.Identity())
    return model


class Weight(NamedTuple):
    name: str
    parameter: nn.Parameter


def weights_of_quantizers(model: nn.Module, what: str) -> dict[Quantizer, list[Weight]]:
    """The weights that are read through each quantizer, which are one tensor. ValueError, in which
    `what` is who asks: they are not any more."""
    weights: dict[Quantizer, list[Weight]] = {}
    for name, quantizer, parameter in quantized_parameters(model):
        same = weights.setdefault(quantizer, [])
        same.append(Weight(name, parameter))
        if elements(parameter) != elements(same[0].parameter):
            raise ValueError(
                f"{what}: {same[0].name} and {name} share {quantizer.label} but are no longer one "
                "tensor: tie them again (model.tie_weights())"
            )
    return weights
