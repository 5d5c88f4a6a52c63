"""`prepare` puts quantizers into a model, `convert` takes them out again."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from asymq.modules import (
    QuantEmbedding,
    QuantGelu,
    QuantLayer,
    QuantLayerNorm,
    QuantLinear,
    QuantOutput,
    is_conv1d,
)
from asymq.quantizer import QuantAct, Quantizer, WeightQuantizer, named_quantizers
from asymq.specs import QuantConfig, QuantSpec


def prepare(model: nn.Module, config: QuantConfig, allow_lookahead: bool = False) -> nn.Module:
    """Puts the quantizers of `config` into `model`, in place, and returns it.

    A GPT2LMHeadModel or OPTForCausalLM of transformers gets one on the output of every operation
    (attention's scores and probabilities, residual sums, logits), every other model on its Linear,
    Conv1D, Embedding and LayerNorm layers. Modules that share a weight share its quantizer, and one
    forward of the model quantizes it once. Calibrate next.

    ValueError, before anything is changed: nothing to quantize, a second prepare, names in
    overrides or skip that match no quantizer, a spec that does not fit its tensor, a dynamic
    activation range in a causal model (it sees later tokens) without `allow_lookahead`.
    """
    if any(named_quantizers(model)):
        raise ValueError("asymq.prepare: the model has quantizers already")
    preparation = Preparation(model, config)
    _family(model).plan(preparation, model)
    preparation.check(allow_lookahead)
    preparation.apply()
    return model


def _family(model: nn.Module):
    """The file of `asymq.models` that knows this model."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type and find_spec(f"asymq.models.{model_type}"):
        family = import_module(f"asymq.models.{model_type}")
        if isinstance(model, family.MODEL):
            return family
    return import_module("asymq.models.generic")


@dataclass
class _Prepared:
    """What `convert` must undo beside the layers; kept as `_asymq` of the model."""

    added: dict[str, list[str]] = field(default_factory=dict)  # submodules by module name
    float_classes: dict[str, type] = field(default_factory=dict)
    attention: str | None = None
    loss: bool = False
    shared: list[WeightQuantizer] = field(default_factory=list)
    hooks: list = field(default_factory=list)


class Preparation:
    """Collects the quantizers of a model, then puts them all in at once.

    A model family calls the methods of the first part; nothing of the model changes before `apply`.
    """

    def __init__(self, model: nn.Module, config: QuantConfig):
        self.model = model
        self.config = config
        self._names: list[str] = []  # of all sites, skipped ones included
        self._owners: dict[int, QuantLayer] = {}  # of weights, by their identity
        self._quantizers: list[Quantizer] = []
        self._steps: list[Callable[[], None]] = []
        self._prepared = _Prepared()

    # ---- what a model family says --------------------------------------------------------------

    def refuse(self, condition: bool, what: str) -> None:
        if condition:
            raise ValueError(
                f"asymq.prepare: {type(self.model).__name__} with {what} is not supported"
            )

    def refuse_fast_path(self, layer: nn.TransformerEncoderLayer) -> None:
        """In evaluation torch runs such a layer in one kernel that reads the weights itself; this
        is the flag that keeps it from that."""

        def step():
            layer.activation_relu_or_gelu = 0

        self._steps.append(step)

    @staticmethod
    def can_wrap(module: nn.Module) -> bool:
        """Exactly these classes: a subclass may use its weight in another way."""
        if type(module) is nn.Embedding:
            return module.max_norm is None and not module.sparse
        return type(module) in (nn.Linear, nn.LayerNorm) or is_conv1d(type(module))

    def wrap(
        self, name: str, cls: type[QuantLayer] | None = None, output: bool = True
    ) -> QuantLayer:
        """Quantizes the weight and, unless it is an embedding or `output` is False, the output of
        the layer `name`, as the class `cls` (by default the one of its type). Returns what will
        take its place."""
        module = self.model.get_submodule(name)
        weight_spec = output_spec = None
        owner = self._owners.get(id(module.weight))
        if isinstance(module, nn.LayerNorm):
            cls, kind = cls or QuantLayerNorm, "norm_weight"
        elif isinstance(module, nn.Embedding):
            cls, kind, output = cls or QuantEmbedding, "weight", False
        else:
            cls, kind = cls or QuantLinear, "weight"
        if module.weight is not None and owner is None:
            weight_spec = self._spec(f"{name}.weight_quantizer", kind)
        if output:
            output_spec = self._spec(f"{name}.output_quantizer", "activation")
        layer = cls.of_float(module, weight_spec, output_spec, name)
        if module.weight is None and layer.output_quantizer is not None:
            layer.output_quantizer.to(self._device)  # such a module has no device of its own
        if owner is None:
            self._owners[id(module.weight)] = layer
        elif owner.weight_quantizer is not None:
            layer.borrow_weight_quantizer(owner)
            self._prepared.shared.append(owner.weight_quantizer)
        self._quantizers += [q for q in (layer.weight_quantizer, layer.output_quantizer) if q]
        self._steps.append(lambda: self._replace(module, layer))
        return layer

    def _replace(self, module: nn.Module, layer: QuantLayer) -> None:
        """Under all its names: one module may serve several times."""
        for name, other in list(self.model.named_modules(remove_duplicate=False)):
            if other is module:
                self.model.set_submodule(name, layer)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def follow(self, name: str, channels: int) -> None:
        """Quantizes the output of the module `name`."""
        quantizer = self._activation(f"{name}.output_quantizer", channels)
        if quantizer is not None:
            output = QuantOutput(self.model.get_submodule(name), quantizer)
            self._steps.append(lambda: self.model.set_submodule(name, output))

    def follow_gelu(self, name: str, layer: QuantLayer) -> None:
        """Quantizes the output of the module `name`, whose GELU (tanh) comes right after `layer`,
        together with the output of that."""
        quantizer = self._activation(f"{name}.output_quantizer", layer.output_channels)
        if quantizer is not None:
            output = QuantGelu(layer, quantizer, self.model.get_submodule(name))
            self._steps.append(lambda: self.model.set_submodule(name, output))

    def add(self, name: str, cls: type | None = None, **channels: int | None) -> None:
        """Gives the module `name` the class `cls`, which uses the activation quantizers named in
        `channels`: the size of their last axis, None where only the tensors know it. A site that
        the configuration leaves out gets an identity."""
        module = self.model.get_submodule(name)
        quantizers = {
            key: self._activation(f"{name}.{key}", size) for key, size in channels.items()
        }

        def step():
            for attribute, quantizer in quantizers.items():
                setattr(module, attribute, quantizer or nn.Identity())
            self._prepared.added[name] = list(quantizers)
            if cls is not None:
                self._prepared.float_classes[name] = type(module)
                module.__class__ = cls

        self._steps.append(step)

    def attention(self, name: str, width: int) -> None:
        """Gives the attention module `name` the quantizers that `quantized_attention` uses, and
        lets the model run it."""
        self.add(name, scores_quantizer=None, probabilities_quantizer=None, context_quantizer=width)
        if self._prepared.attention is None:
            from asymq.attention import NAME

            self._prepared.attention = self.model.config._attn_implementation
            self._steps.append(lambda: _run_attention(self.model, NAME))

    def causal_lm_loss(self) -> None:
        """Takes the loss of the logits before their quantizer, which a QuantLogits keeps; unless
        the model's loss is another one than transformers'."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        from asymq.loss import causal_lm_loss

        if self.model.loss_function is ForCausalLMLoss:
            self._prepared.loss = True
            self._steps.append(lambda: setattr(self.model, "loss_function", causal_lm_loss))

    def _spec(self, name: str, kind: str) -> QuantSpec | None:
        self._names.append(name)
        return self.config.spec_of(name, kind)

    def _activation(self, name: str, channels: int | None) -> QuantAct | None:
        spec = self._spec(name, "activation")
        if spec is None:
            return None
        quantizer = QuantAct.on_last_axis(spec, channels, name, self._device)
        self._quantizers.append(quantizer)
        return quantizer

    # ---- what `prepare` does with it -----------------------------------------------------------

    def check(self, allow_lookahead: bool) -> None:
        model, what = self.model, "asymq.prepare"
        unmatched = self.config.unmatched(self._names)
        if unmatched:
            raise ValueError(
                f"{what}: no quantizer of {type(model).__name__} is called {', '.join(unmatched)}; "
                f"they are called {', '.join(self._names[:3])} and so on"
            )
        if not self._quantizers:
            raise ValueError(
                f"{what}: the configuration leaves {type(model).__name__} no quantizer"
            )
        if not allow_lookahead and any(getattr(m, "is_causal", False) for m in model.modules()):
            for quantizer in self._quantizers:
                if quantizer.spec.dynamic and quantizer.kind == "activation":
                    raise ValueError(
                        f"{what}: {quantizer.name} is dynamic: its range sees the whole tensor, so "
                        "every token sees later ones; allow_lookahead=True accepts that"
                    )

    def apply(self) -> None:
        for step in self._steps:
            step()
        model, prepared = self.model, self._prepared
        prepared.hooks.append(model.register_load_state_dict_pre_hook(_check_state))
        if prepared.shared:
            prepared.hooks.append(model.register_forward_pre_hook(_begin_sharing))
            prepared.hooks.append(model.register_forward_hook(_end_sharing, always_call=True))
        model._asymq = prepared


# Hooks are functions of this module, so that a prepared model can be pickled.


def _begin_sharing(model, args) -> None:
    for quantizer in model._asymq.shared:
        quantizer.share_within_forward(True)


def _end_sharing(model, args, output) -> None:
    for quantizer in model._asymq.shared:
        quantizer.share_within_forward(False)


def _check_state(model, state_dict, prefix, *_) -> None:
    """A state of other quantizers raises before load_state_dict has changed anything."""
    suffix = "._extra_state"
    own = {f"{prefix}{name}" for name, _ in named_quantizers(model)}
    states = {key.removesuffix(suffix) for key in state_dict if key.endswith(suffix)}
    found = {name for name in states if name in own or name.endswith("quantizer")}
    if found and found != own:
        name = min(found ^ own)
        lacking = "the model has" if name in found else "the state has"
        raise RuntimeError(f"{name}: the state is of another config: {lacking} no such quantizer")
    for name, quantizer in named_quantizers(model):
        quantizer.check_state(state_dict, f"{prefix}{name}.")


def _run_attention(model, implementation: str) -> None:
    """The configuration says which attention runs; models may share one, so this gets its own."""
    shared, own = model.config, deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    model.set_attn_implementation(implementation)


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Takes every quantizer out, in place, and returns the plain model.

    Weights become their dequantized values, of their own dtype and still tied; activations are no
    longer quantized. RuntimeError, before anything is changed, if a weight's range is not set.
    ValueError: the model has no quantizers, or not from `prepare`.
    """
    if not any(named_quantizers(model)):
        raise ValueError("asymq.convert: the model has no quantizers")
    if not hasattr(model, "_asymq"):
        raise ValueError(f"asymq.convert: {type(model).__name__} was not given to asymq.prepare")
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    values = {
        layer: layer.weight_quantizer.fake_quantize(layer.weight)
        for layer in layers
        if layer.weight_quantizer is not None
    }
    for layer, value in values.items():
        layer.weight.copy_(value)
    plain = {layer: layer.to_float() for layer in layers}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in plain:
            model.set_submodule(name, plain[module])
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantOutput):
            model.set_submodule(name, module.to_float())
    prepared = model._asymq
    for name, attributes in prepared.added.items():
        module = model.get_submodule(name)
        for attribute in attributes:
            delattr(module, attribute)
        if name in prepared.float_classes:
            module.__class__ = prepared.float_classes[name]
    for hook in prepared.hooks:
        hook.remove()
    if prepared.loss:
        del model._loss_function
    if prepared.attention is not None:
        model.set_attn_implementation(prepared.attention)
    del model._asymq
    return model
