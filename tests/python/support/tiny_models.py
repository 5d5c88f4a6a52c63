"""Language models of two layers whose weights are all away from 0 and 1."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import asymq

transformers = pytest.importorskip("transformers", minversion="5.4")

VOCABULARY = 96
SETTINGS = ("scale_offset", "min_max", "beta_gamma", "beta_gamma_sigmoid", "kscale_koffset")


def _build(cls: type, config, sizes: dict) -> nn.Module:
    """The same model at every call, in evaluation mode, with weights and biases large enough that
    attention is not uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = cls(config(bos_token_id=0, eos_token_id=0, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def gpt2(**options) -> nn.Module:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32}
    return _build(transformers.GPT2LMHeadModel, transformers.GPT2Config, sizes | options)


def opt(**options) -> nn.Module:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4}
    sizes |= {"word_embed_proj_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
    sizes |= {"pad_token_id": 1}
    return _build(transformers.OPTForCausalLM, transformers.OPTConfig, sizes | options)


FAMILIES = {"gpt2": gpt2, "opt": opt}


def _of_llama_s_kind(name: str, config: str = "", **sizes):
    """A function that makes such a model: 4 heads of 8 channels, two of which share keys."""

    def make(**options) -> nn.Module:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        base = {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "vocab_size": 97,
        }
        base |= heads | {"max_position_embeddings": 64, "pad_token_id": 0}
        cls = getattr(transformers, f"{name}ForCausalLM")
        return _build(cls, getattr(transformers, f"{config or name}Config"), base | sizes | options)

    return make


_GEMMA = {"sliding_window": 4, "query_pre_attn_scalar": 8}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
DECODERS = {
    "llama": _of_llama_s_kind("Llama"),
    "llama-tied": _of_llama_s_kind("Llama", tie_word_embeddings=True),
    "mistral": _of_llama_s_kind("Mistral", sliding_window=4),
    "qwen2": _of_llama_s_kind("Qwen2"),
    "qwen3": _of_llama_s_kind("Qwen3"),
    "smollm3": _of_llama_s_kind("SmolLM3"),
    "gemma": _of_llama_s_kind("Gemma"),
    "gemma2": _of_llama_s_kind("Gemma2", **_GEMMA),
    "gemma3": _of_llama_s_kind("Gemma3", "Gemma3Text", **_GEMMA),
    "phi3": _of_llama_s_kind("Phi3"),
    "olmo2": _of_llama_s_kind("Olmo2"),
}
MIXTURES = {
    "mixtral": _of_llama_s_kind("Mixtral", num_local_experts=4, **_EXPERTS),
    "qwen3-moe": _of_llama_s_kind("Qwen3Moe", num_experts=4, moe_intermediate_size=16, **_EXPERTS),
}


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_a_file,
}


def tokens(batch: int = 2, length: int = 12, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def prepared(model: nn.Module, setting="beta_gamma", **options) -> nn.Module:
    """With calibrated quantizers, of a setting of the paper's table 2 or of a configuration."""
    config = asymq.QuantConfig.table2(setting) if isinstance(setting, str) else setting
    asymq.prepare(model, config, **options)
    asymq.calibrate(model, [tokens(seed=seed) for seed in (3, 4)])
    return model


def logits(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def next_token_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch, labels=batch).loss


def train(model: nn.Module, steps: int, lr: float, batch: torch.Tensor | None = None) -> list:
    """Losses of Adam on the ranges alone."""
    batch = tokens().to(next(model.parameters()).device) if batch is None else batch
    optimizer = torch.optim.Adam(asymq.range_parameters(model, lr))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = next_token_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
