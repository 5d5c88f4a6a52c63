"""GPT-2: 12 activations per block and 3 more (table 2 of the paper names the operations)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block, GPT2LMHeadModel

from asymq.layers import Quantized, QuantLogits, fused
from asymq.layers.activation import is_tanh_gelu
from asymq.layers.conv1d import QuantConv1D
from asymq.models.block import QuantBlock, argument_names, plan_block
from asymq.models.root import QuantCausalLM
from asymq.models.sites import Plan
from asymq.quantizers import apply, is_unobserved

MODEL = GPT2LMHeadModel


class QuantGPT2Block(QuantBlock, GPT2Block):
    float_class = GPT2Block
    _names = argument_names(GPT2Block)
    ln_1: nn.Module
    attn: nn.Module
    ln_2: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        kwargs = self.by_name(args, kwargs)
        if kwargs.pop("encoder_hidden_states", None) is not None:
            raise ValueError(
                "asymq: a prepared GPT-2 has no cross attention: encoder_hidden_states must be None"
            )
        kwargs.pop("encoder_attention_mask", None)
        hidden_states = apply(self.input_quantizer, hidden_states)
        attention, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = apply(self.attention_sum_quantizer, hidden_states + attention)
        mlp = self.mlp(self.ln_2(hidden_states))
        return apply(self.mlp_sum_quantizer, hidden_states + mlp)


class QuantGPT2MLP(Quantized, GPT2MLP):
    """An MLP whose GELU goes through one kernel with the quantizers before and after it."""

    float_class = GPT2MLP
    c_fc: nn.Module
    act: nn.Module
    c_proj: nn.Module
    dropout: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        c_fc, act = self.c_fc, self.act
        if fused.may_skip(c_fc, QuantConv1D) and is_tanh_gelu(act) and is_unobserved(act):
            after = getattr(act, "output_quantizer", None)
            hidden_states = fused.gelu(c_fc.product(hidden_states), c_fc.output_quantizer, after)
        else:
            hidden_states = act(c_fc(hidden_states))
        return self.dropout(self.c_proj(hidden_states))


def plan(plan: Plan, model: GPT2LMHeadModel) -> None:
    config = model.config
    plan.refuse(config.add_cross_attention, "cross attention")
    plan.refuse(config.reorder_and_upcast_attn, "reorder_and_upcast_attn")
    plan.layer("transformer.wte")
    plan.layer("transformer.wpe")
    width = config.hidden_size
    for i in range(len(model.transformer.h)):
        name = f"transformer.h.{i}"
        plan_block(plan, name, QuantGPT2Block, "attn", width, first=i == 0)
        for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            plan.layer(f"{name}.{layer}")
        plan.output(f"{name}.mlp.act", config.n_inner or 4 * width)
        plan.becomes(f"{name}.mlp", QuantGPT2MLP)
    plan.layer("transformer.ln_f")
    plan.layer("lm_head", QuantLogits)
    plan.becomes("", QuantCausalLM)
