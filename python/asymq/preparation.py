"""`prepare` puts quantizers into a model."""

from __future__ import annotations

import warnings

from torch import nn

from asymq import training
from asymq.config import QuantConfig
from asymq.layers.quantized import need_own_forward, put_in
from asymq.models import family_of, generic
from asymq.models.pretrained import QuantPreTrained
from asymq.models.root import Prepared
from asymq.models.sites import Plan
from asymq.quantizers import is_split, named_quantizers
from asymq.quantizers.quantizer import PICKLE_OF_0_1
from asymq.wrappers import is_sharded, pretrained_models, wrapper_of

WHAT = "asymq.prepare"


def prepare(model: nn.Module, config: QuantConfig, allow_lookahead: bool = False) -> nn.Module:
    """Puts the quantizers of `config` into `model`, in place, and returns it.

    A decoder of transformers, also one within another module, gets one on the output of every
    operation (attention's queries, keys, values, scores and probabilities, products of gated MLPs,
    residual sums, logits): GPT2LMHeadModel, OPTForCausalLM, and all whose layers and MLPs are of
    the structure of Llama's, which is read from their source. Other models of transformers get them
    on attention, activation functions and layers, every other model on its layers: Linear, Conv1D,
    Conv1d, Conv2d, Embedding, LayerNorm, RMSNorm and their subclasses. Of experts the weights, and
    with ``input`` what they multiply, are quantized. A warning names what is not.
    Modules that share a weight share its quantizer, and one forward of the model quantizes it once.
    Quantizers that the model has already stay. Calibrate next.

    Each module gets a class that is a subclass of its own: objects, hooks, ties, parameter names
    and isinstance answers stay.

    ValueError, before anything is changed: nothing to quantize, a second prepare, a wrapped or
    sharded model, names in overrides or skip that match no quantizer, a spec that does not fit its
    tensor, a weight that cannot be read through a quantizer or is used where none is, a dynamic
    activation range in a causal model (it sees later tokens) without `allow_lookahead`.
    """
    plan = plan_of(model, config)
    for message in plan.left_float:
        warnings.warn(message, stacklevel=2)
    return carry_out(plan, allow_lookahead)


def plan_of(model: nn.Module, config: QuantConfig) -> Plan:
    """What `prepare` is to do, and what it will say that it leaves."""
    _check_arguments(model, config)
    plan = Plan(model, config)
    (family_of(model) or generic).plan(plan, model)
    return plan


def carry_out(plan: Plan, allow_lookahead: bool) -> nn.Module:
    """The plan's model, prepared. ValueError, before anything is changed, where it cannot be."""
    model = plan.root
    plan.give_weights_quantizers()
    plan.check(allow_lookahead)
    plan.apply()
    for pretrained in pretrained_models(model):
        put_in(pretrained, QuantPreTrained, {})
    put_in(model, Prepared, {})
    for name, quantizer in named_quantizers(model):
        quantizer.name = name  # the model's own had none, or that within their layer
    training.warn_of_decay(model)
    return model


def _check_arguments(model: nn.Module, config: QuantConfig) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{WHAT}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, QuantConfig):
        hint = f": QuantConfig.table2({config!r})" if isinstance(config, str) else ""
        raise ValueError(f"{WHAT}: config must be a QuantConfig, got {type(config).__name__}{hint}")
    wrapper = wrapper_of(model)
    if wrapper is not None:
        raise ValueError(
            f"{WHAT}: {wrapper.title} wraps a model, and would not know of what is put into it: "
            f"prepare model.{wrapper.attribute} first, then wrap it"
        )
    if any(isinstance(module, Prepared) for module in model.modules()):
        raise ValueError(f"{WHAT}: the model has quantizers already")
    if any(map(is_sharded, model.modules())) or any(map(is_split, model.parameters())):
        raise ValueError(
            f"{WHAT}: the model's parameters are split among processes: prepare it first, then "
            "shard it with asymq.shard"
        )
    need_own_forward(model, type(model).__name__)


def __getattr__(name: str):
    """What pickles of version 0.1 ask for."""
    if name in ("_begin_sharing", "_end_sharing", "_check_state", "_Prepared"):
        raise RuntimeError(PICKLE_OF_0_1)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
