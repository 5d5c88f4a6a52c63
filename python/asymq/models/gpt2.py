"""GPT-2: 12 activations per block and 3 more (table 2 of the paper names the operations)."""

from __future__ import annotations

from inspect import signature

from torch import Tensor
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2LMHeadModel

# Unpickling a model imports this file alone, and the model runs this attention.
import asymq.attention  # noqa: F401
from asymq.modules import QuantLogits
from asymq.preparation import Preparation

MODEL = GPT2LMHeadModel


class QuantGPT2Block(GPT2Block):
    """A block that quantizes both residual sums."""

    # transformers passes some arguments by position, and attention takes all by name.
    _names = tuple(signature(GPT2Block.forward).parameters)[2:]

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        kwargs.update(zip(self._names, args, strict=False))
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            kwargs.pop(name, None)
        attention, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = self.attention_sum_quantizer(hidden_states + attention)
        return self.mlp_sum_quantizer(hidden_states + self.mlp(self.ln_2(hidden_states)))


class QuantGPT2FirstBlock(QuantGPT2Block):
    """The first block quantizes what it is given as well: the sum of the embeddings."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return super().forward(self.input_quantizer(hidden_states), *args, **kwargs)


def plan(preparation: Preparation, model: GPT2LMHeadModel) -> None:
    config = model.config
    preparation.refuse(config.add_cross_attention, "cross attention")
    preparation.refuse(config.reorder_and_upcast_attn, "reorder_and_upcast_attn")
    preparation.wrap("transformer.wte")
    preparation.wrap("transformer.wpe")
    width = config.hidden_size
    for i, block in enumerate(model.transformer.h):
        name = f"transformer.h.{i}"
        sums = dict.fromkeys(("attention_sum_quantizer", "mlp_sum_quantizer"), width)
        if i == 0:
            preparation.add(name, QuantGPT2FirstBlock, input_quantizer=width, **sums)
        else:
            preparation.add(name, QuantGPT2Block, **sums)
        for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_proj"):
            preparation.wrap(f"{name}.{layer}")
        preparation.attention(f"{name}.attn", width)
        c_fc = preparation.wrap(f"{name}.mlp.c_fc")
        if isinstance(block.mlp.act, NewGELUActivation):
            preparation.follow_gelu(f"{name}.mlp.act", c_fc)
        else:
            preparation.follow(f"{name}.mlp.act", c_fc.output_channels)
    preparation.wrap("transformer.ln_f")
    preparation.wrap("lm_head", QuantLogits)
    preparation.causal_lm_loss()
