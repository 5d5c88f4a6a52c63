"""What a prepared model does beside its layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn

from asymq.layers import Quantized
from asymq.quantizers import named_quantizers, sharing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Prepared(Quantized):
    """The root of a prepared model, within which forwards share and states are whole."""

    expect_reached: bool  # whether the next forward has to say what it does not reach
    adapters: tuple[str, ...] = ()  # peft's, which may compute past the layers that they are put on

    def begin(self) -> None:
        self.expect_reached = True
        self.adapters = self._find_adapters()

    def end(self) -> None:
        del self.expect_reached
        self.__dict__.pop("adapters", None)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        if self.adapters != (adapters := self._find_adapters()):
            self.adapters, self.expect_reached = adapters, True
            for _, quantizer in named_quantizers(self):
                quantizer.reached = False
        with sharing():
            result = super().__call__(*args, **kwargs)
        if self.expect_reached:
            self.expect_reached = False
            what = f" with the adapters {', '.join(self.adapters)}" if self.adapters else ""
            warn_of_unreached(self, f"the first forward after asymq.prepare{what}")
        return result

    def _find_adapters(self) -> tuple[str, ...]:
        return tuple(getattr(self, "peft_config", ()))

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """A state of other quantizers raises before anything is changed."""
        check_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def check_state(model: nn.Module, state_dict: dict, prefix: str) -> None:
    """RuntimeError where `state_dict` is that of a model with other quantizers."""
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


def warn_of_unreached(model: nn.Module, when: str, besides: Sequence[str] = ()) -> None:
    """One warning that names the quantizers that no forward has come to, `besides` some."""
    unreached = [
        name
        for name, quantizer in named_quantizers(model)
        if not quantizer.reached and name not in besides
    ]
    if unreached:
        warnings.warn(
            f"asymq: {when} did not use {', '.join(unreached)}: what is never used (a weight that "
            "another module reads, an attention that is switched away, an input that the batches "
            "lack) is not quantized, and does not learn",
            stacklevel=3,
        )


class QuantAttentionModel(Quantized):
    """A model of transformers with attention. Where scores or probabilities are quantized, its
    masks are those of `quantized_attention`."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its models
        config: PreTrainedConfig

    def begin(self) -> None:
        """The configuration says which attention runs; others may share it: this gets its own."""
        from transformers import PreTrainedConfig

        from asymq.layers.attention import NAME, QuantAttention

        attentions = [m for m in self.modules() if isinstance(m, QuantAttention) and m.has_scores]
        if not attentions:
            return
        copies: dict = {}  # one for each, also of those within others
        for module in self.modules():
            for name in ("config", "model_config"):
                config = vars(module).get(name)
                if isinstance(config, PreTrainedConfig):
                    setattr(module, name, deepcopy(config, copies))
        self._asymq_attention = []
        for config in (attention.model_config for attention in attentions):
            if config._attn_implementation != NAME:
                self._asymq_attention.append((config, config._attn_implementation))
                config._attn_implementation_internal = NAME

    def end(self) -> None:
        from asymq.layers.attention import NAME

        for config, before in self.__dict__.pop("_asymq_attention", ()):
            if config._attn_implementation == NAME:
                config._attn_implementation_internal = before


class QuantCausalLM(QuantAttentionModel):
    """A language model whose loss knows what the logits were before their quantizer."""

    @property
    def loss_function(self):
        """transformers' causal loss becomes ours; a loss function of the user's stays."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        from asymq.layers.loss import causal_lm_loss

        own = super().loss_function  # type: ignore[misc]
        return causal_lm_loss if own is ForCausalLMLoss else own

    @loss_function.setter
    def loss_function(self, value) -> None:
        self._loss_function = value
