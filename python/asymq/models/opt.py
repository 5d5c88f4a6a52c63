"""OPT: 13 activations per layer and 3 more (table 2 of the paper names the operations)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.models.opt.modeling_opt import OPTDecoderLayer, OPTForCausalLM

from asymq.layers import QuantLogits
from asymq.models.block import QuantBlock, argument_names, cached, plan_block
from asymq.models.root import QuantCausalLM
from asymq.models.sites import Plan
from asymq.quantizers import apply

MODEL = OPTForCausalLM


class QuantOPTDecoderLayer(QuantBlock, OPTDecoderLayer):
    float_class = OPTDecoderLayer
    _names = argument_names(OPTDecoderLayer)
    self_attn: nn.Module
    self_attn_layer_norm: nn.Module
    activation_fn: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    final_layer_norm: nn.Module
    dropout: float

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        kwargs = self.by_name(args, kwargs)
        hidden_states = apply(self.input_quantizer, hidden_states)
        attention, _ = self.self_attn(
            hidden_states=self._before(self.self_attn_layer_norm, hidden_states), **kwargs
        )
        attention = dropout(attention, p=self.dropout, training=self.training)
        hidden_states = apply(self.attention_sum_quantizer, hidden_states + attention)
        hidden_states = self._after(self.self_attn_layer_norm, hidden_states)

        mlp = self.activation_fn(self.fc1(self._before(self.final_layer_norm, hidden_states)))
        mlp = dropout(self.fc2(mlp), p=self.dropout, training=self.training)
        hidden_states = apply(self.mlp_sum_quantizer, hidden_states + mlp)
        return self._after(self.final_layer_norm, hidden_states)

    # OPT-350m alone normalizes after the sums.

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.do_layer_norm_before else x

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.do_layer_norm_before else norm(x)


def plan(plan: Plan, model: OPTForCausalLM) -> None:
    decoder, width = model.model.decoder, model.config.hidden_size
    plan.layer("model.decoder.embed_tokens")
    plan.layer("model.decoder.embed_positions")
    for name in ("project_in", "project_out"):
        if getattr(decoder, name) is not None:
            plan.layer(f"model.decoder.{name}")
    for i, layer in enumerate(decoder.layers):
        name = f"model.decoder.layers.{i}"
        plan_block(plan, name, QuantOPTDecoderLayer, "self_attn", width, first=i == 0)
        for projection in ("q_proj", "k_proj", "out_proj"):
            plan.layer(f"{name}.self_attn.{projection}")
        # A cache's values have a quantizer of their own.
        plan.layer(f"{name}.self_attn.v_proj", output=not cached(plan, layer.self_attn))
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            plan.layer(f"{name}.{norm}")
        # A ReLU's output alone is quantized: what it clips needs no grid of its own.
        relu = isinstance(layer.activation_fn, nn.ReLU)
        plan.layer(f"{name}.fc1", output=not relu)
        plan.output(f"{name}.activation_fn", model.config.ffn_dim)
        plan.layer(f"{name}.fc2")
    if decoder.final_layer_norm is not None:
        plan.layer("model.decoder.final_layer_norm")
    plan.layer("lm_head", QuantLogits)
    plan.becomes("", QuantCausalLM)
