"""OPT: 13 activations per layer and 3 more (table 2 of the paper names the operations)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.models.opt.modeling_opt import (
    OPTDecoderLayer,
    OPTForCausalLM,
    OPTLearnedPositionalEmbedding,
)

# Unpickling a model imports this file alone, and the model runs this attention.
import asymq.attention  # noqa: F401
from asymq.modules import QuantEmbedding, QuantLogits
from asymq.preparation import Preparation

MODEL = OPTForCausalLM


class QuantOPTLearnedPositionalEmbedding(OPTLearnedPositionalEmbedding, QuantEmbedding):
    """Finds the positions as the float module does, then looks them up in the quantized weight."""


class QuantOPTDecoderLayer(OPTDecoderLayer):
    """A layer that quantizes both residual sums."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attention, _ = self.self_attn(
            hidden_states=self._before(self.self_attn_layer_norm, hidden_states), **kwargs
        )
        attention = dropout(attention, p=self.dropout, training=self.training)
        hidden_states = self.attention_sum_quantizer(hidden_states + attention)
        hidden_states = self._after(self.self_attn_layer_norm, hidden_states)

        mlp = self.activation_fn(self.fc1(self._before(self.final_layer_norm, hidden_states)))
        mlp = dropout(self.fc2(mlp), p=self.dropout, training=self.training)
        hidden_states = self.mlp_sum_quantizer(hidden_states + mlp)
        return self._after(self.final_layer_norm, hidden_states)

    # OPT-350m alone normalizes after the sums.

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.do_layer_norm_before else x

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.do_layer_norm_before else norm(x)


class QuantOPTFirstDecoderLayer(QuantOPTDecoderLayer):
    """The first layer quantizes what it is given as well: the sum of the embeddings."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        return super().forward(self.input_quantizer(hidden_states), **kwargs)


def plan(preparation: Preparation, model: OPTForCausalLM) -> None:
    decoder, width = model.model.decoder, model.config.hidden_size
    preparation.wrap("model.decoder.embed_tokens")
    preparation.wrap("model.decoder.embed_positions", QuantOPTLearnedPositionalEmbedding)
    for name in ("project_in", "project_out"):
        if getattr(decoder, name) is not None:
            preparation.wrap(f"model.decoder.{name}")
    for i, layer in enumerate(decoder.layers):
        name = f"model.decoder.layers.{i}"
        sums = dict.fromkeys(("attention_sum_quantizer", "mlp_sum_quantizer"), width)
        if i == 0:
            preparation.add(name, QuantOPTFirstDecoderLayer, input_quantizer=width, **sums)
        else:
            preparation.add(name, QuantOPTDecoderLayer, **sums)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            preparation.wrap(f"{name}.self_attn.{projection}")
        preparation.attention(f"{name}.self_attn", width)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            preparation.wrap(f"{name}.{norm}")
        # A ReLU's output alone is quantized: what it clips needs no grid of its own.
        relu = isinstance(layer.activation_fn, nn.ReLU)
        preparation.wrap(f"{name}.fc1", output=not relu)
        preparation.follow(f"{name}.activation_fn", layer.fc1.out_features)
        preparation.wrap(f"{name}.fc2")
    if decoder.final_layer_norm is not None:
        preparation.wrap("model.decoder.final_layer_norm")
    preparation.wrap("lm_head", QuantLogits)
    preparation.causal_lm_loss()
