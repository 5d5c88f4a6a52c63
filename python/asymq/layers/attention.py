"""Attention with quantizers, for transformers' attention interface.

What an attention module hands to the interface, and gets from it, is where its quantizers are:
queries and keys (after their rotation), values, scores, probabilities and the context.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_overlay
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from asymq import _library
from asymq.layers import fused
from asymq.layers.quantized import Quantized
from asymq.quantizers import OFF, Quantizer, apply

NAME = "asymq"
# Arguments of attention that other keys than the mask's, or sinks, would come from.
REFUSED = ("s_aux", "sinks", "indices", "block_indices")


def is_attention(module: nn.Module) -> bool:
    """Whether its forward goes through transformers' attention interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return (
        hasattr(module, "is_causal")
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and code is not None
        and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    )


class QuantAttention(Quantized):
    """An attention module of transformers that goes through its attention interface, where
    `quantized_attention` uses these quantizers.

    It alone has a configuration that names that function, a copy: that of the model, here
    ``model_config``, says who makes the masks, and who does what has no quantizers.
    """

    sites = (
        "query_quantizer",
        "key_quantizer",
        "value_quantizer",
        "scores_quantizer",
        "probabilities_quantizer",
        "context_quantizer",
    )
    kinds: ClassVar[Mapping[str, str]] = {"key_quantizer": "cache", "value_quantizer": "cache"}
    token_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "query_quantizer": (2,),
        "key_quantizer": (2,),
        "value_quantizer": (2,),
        "scores_quantizer": (2, 3),
        "probabilities_quantizer": (2, 3),
    }
    query_quantizer: Quantizer | None
    key_quantizer: Quantizer | None
    value_quantizer: Quantizer | None
    scores_quantizer: Quantizer | None
    probabilities_quantizer: Quantizer | None
    context_quantizer: Quantizer | None
    config: PreTrainedConfig
    model_config: PreTrainedConfig
    eager: ClassVar[Callable | None]

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(float_class.forward)
        def forward(self, *args, **kwargs):
            self.need_interface()
            return float_class.forward(self, *args, **kwargs)

        # "eager" is what its file calls so.
        eager = getattr(sys.modules[float_class.__module__], "eager_attention_forward", None)
        return {"forward": forward, "eager": eager and staticmethod(eager)}

    def begin(self) -> None:
        self.model_config, self.config = self.config, copy.copy(self.config)
        self.config._attn_implementation_internal = NAME

    def end(self) -> None:
        self.config = self.__dict__.pop("model_config")

    def rest(self) -> Callable | None:
        """The model's own implementation of what lies between values and context; None: it is
        `quantized_attention`'s."""
        implementation = self.model_config._attn_implementation
        if implementation in (NAME, None):
            return None
        if implementation == "eager":
            return None if self.has_scores else self.eager
        return ALL_ATTENTION_FUNCTIONS[implementation]

    @property
    def has_scores(self) -> bool:
        """Whether it quantizes what only `quantized_attention` computes."""
        return self.scores_quantizer is not None or self.probabilities_quantizer is not None

    def need_interface(self) -> None:
        """RuntimeError where another implementation has been chosen, which would pass over the
        quantizers of scores and probabilities."""
        implementation = self.model_config._attn_implementation
        if implementation == NAME:
            return
        for quantizer in (self.scores_quantizer, self.probabilities_quantizer):
            if quantizer is not None and quantizer.state != OFF:
                raise RuntimeError(
                    f"{quantizer.label}: the attention implementation {implementation!r} knows no "
                    f"quantizers: call model.set_attn_implementation({NAME!r}), or turn the "
                    "quantizers off (asymq.disable_quantizers)"
                )


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """(context [batch, queries, heads, width], probabilities [batch, heads, queries, keys], or None
    where they have not come to memory).

    query: [batch, heads, queries, width]. key, value: [batch, key heads, keys, width]; a key head
    serves heads / key heads consecutive ones. attention_mask: what `attention_mask` below makes,
    True where a query sees a key, or one that is added to the scores; broadcast against [batch,
    heads, queries, keys]. None: the causal one, of sliding_window keys if that is given, where the
    attention is causal and there are as many keys as queries. softcap: scores become softcap *
    tanh(scores / softcap), position_bias is added to them, before their quantizer.

    Where the model has another implementation, which nothing here needs to be otherwise, that one
    does what lies between the values and the context, with its own mask; without probabilities
    then.
    """
    # One implementation runs all attention of a model, also that without quantizers.
    sites: dict[str, Any] = module._modules
    of_query, of_key, of_value, before, after, of_context = map(sites.get, QuantAttention.sites)
    query, key, value = apply(of_query, query), apply(of_key, key), apply(of_value, value)
    rest = module.rest() if isinstance(module, QuantAttention) else None
    if rest is not None:
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        context, probabilities = rest(module, query, key, value, attention_mask, **options)
    else:
        dropout = dropout if module.training else 0.0
        context, probabilities = _attention(
            module, query, key, value, attention_mask, scaling, dropout, before, after, **kwargs
        )
    # The heads lie side by side, so that a channel is a channel of the output.
    context = apply(of_context, context.flatten(2)).view(context.shape)
    return context, probabilities


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    before: Quantizer | None,
    after: Quantizer | None,
    *,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise RuntimeError(
                f"asymq: {type(module).__name__} gives attention {name}, which quantized scores "
                "and probabilities do not know: leave both out (skip)"
            )
    if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
        # A mask of four dimensions comes as the user made it.
        raise ValueError(
            "asymq: an attention mask of four dimensions must be bool (True: seen) or floating "
            f"point (added to the scores), got {mask.dtype}"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    causal = mask is None and query.shape[2] == key.shape[2] and bool(is_causal)
    window = sliding_window if causal else None
    plain = not dropout and softcap is None and position_bias is None
    if plain and not _shows(module, kwargs) and _has_kernel(query, key, value):
        context = fused.attention(query, key, value, mask, scaling, causal, window, before, after)
        if context is not None:
            return context.transpose(1, 2), None
    # Scaling the queries spares a pass over the scores.
    scores = _matmul(query * scaling, key.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    probabilities = fused.softmax(scores, mask, causal, window, before, after)
    context = _matmul(nn.functional.dropout(probabilities, dropout), value)
    return context.transpose(1, 2), probabilities


def _has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `fused.attention` takes these as they are, and is the faster way."""
    dtype = query.dtype
    return (
        query.is_cuda
        and query.shape[-1] == value.shape[-1] <= 128
        and query.shape[-1] * query.element_size() % 16 == 0
        and dtype == key.dtype == value.dtype != torch.float64
        and (not torch.is_autocast_enabled("cuda") or torch.get_autocast_dtype("cuda") == dtype)
        and _has_tensor_cores(query.device)
        and (dtype != torch.float32 or _allows_tf32())
    )


@torch.compiler.assume_constant_result
def _has_tensor_cores(device: torch.device) -> bool:
    native = "CUDA" in _library.implementation()
    return native and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def _allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _shows(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether somebody may want the probabilities: the model returns them, or a hook sees them, as
    transformers' own of output_attentions."""
    config = getattr(module, "model_config", getattr(module, "config", None))
    wanted = options.get("output_attentions", getattr(config, "output_attentions", False))
    return bool(wanted or module._forward_hooks)


def _matmul(x: Tensor, of_keys: Tensor) -> Tensor:
    """x @ of_keys, where one head of `of_keys` serves as many consecutive heads of x as there are,
    without a copy for each: x [batch, heads, m, n], of_keys [batch, key heads, n, k]."""
    heads, of_key = x.shape[1], of_keys.shape[1]
    if heads == of_key:
        return x @ of_keys
    rows = x.reshape(x.shape[0], of_key, heads // of_key * x.shape[2], x.shape[3])
    return (rows @ of_keys).view(*x.shape[:3], of_keys.shape[-1])


def attention_mask(*args, **kwargs) -> Tensor | None:
    """transformers' boolean mask; None for the causal one, with a sliding window or without, which
    needs no tensor."""
    plain = (
        kwargs.get("attention_mask") is None
        and _is_causal(kwargs["mask_function"], kwargs.get("local_size"))
        and kwargs.get("q_length") == kwargs["kv_length"]
    )
    return None if plain else sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _is_causal(function: Callable, window: int | None) -> bool:
    """Whether a mask function of transformers is the causal one, where there is a sliding window
    with it, and nothing besides."""
    if window is None:
        return function is causal_mask_function
    if torch.compiler.is_compiling():
        return False  # dynamo reads no closures
    # What and_masks makes of the two.
    parts = inspect.getclosurevars(function).nonlocals.get("mask_functions", ())
    return (
        len(parts) == 2
        and parts[0].__code__ in sliding_window_overlay.__code__.co_consts
        and inspect.getclosurevars(parts[0]).nonlocals["sliding_window"] == window
        and parts[1] is causal_mask_function
    )


AttentionInterface.register(NAME, quantized_attention)
AttentionMaskInterface.register(NAME, attention_mask)
