"""What blocks of transformers have in common: attention, and of some decoders two residual sums."""

from __future__ import annotations

from inspect import signature
from typing import ClassVar

from torch import nn

from asymq.layers import Quantized, QuantLayer, registry
from asymq.layers.attention import QuantAttention
from asymq.models.sites import Plan, is_adapter
from asymq.quantizers import Quantizer


class QuantBlock(Quantized):
    """A block that quantizes both residual sums; the first one what it is given as well, the sum of
    the embeddings."""

    sites = ("input_quantizer", "attention_sum_quantizer", "mlp_sum_quantizer")
    input_quantizer: Quantizer | None
    attention_sum_quantizer: Quantizer | None
    mlp_sum_quantizer: Quantizer | None
    _names: ClassVar[tuple[str, ...]]  # of the forward's arguments after the hidden states

    def by_name(self, args: tuple, kwargs: dict) -> dict:
        """All arguments by name: transformers passes some by position, and attention takes none."""
        return kwargs | dict(zip(self._names, args, strict=False))


def argument_names(block: type[nn.Module]) -> tuple[str, ...]:
    """Of a block's forward, after the hidden states."""
    return tuple(signature(block.forward).parameters)[2:]


def plan_block(
    plan: Plan, name: str, base: type[QuantBlock], attention: str, width: int, first: bool
) -> None:
    """The sites of a block, and of its module `attention`, that lie between the layers."""
    given = {"input_quantizer": width} if first else {}
    plan.sites(name, base, **given, attention_sum_quantizer=width, mlp_sum_quantizer=width)
    plan.sites(
        f"{name}.{attention}",
        QuantAttention,
        **cached(plan, plan.model.get_submodule(f"{name}.{attention}")),
        scores_quantizer=None,
        probabilities_quantizer=None,
        context_quantizer=width,
    )


def cached(plan: Plan, attention: nn.Module) -> dict[str, int | None]:
    """Sites of the keys and values, where the configuration has something for the cache alone."""
    if plan.config.cache is None:
        return {}
    return dict.fromkeys(("key_quantizer", "value_quantizer"), _width_of_heads(attention))


def plan_attention(plan: Plan, name: str, module: nn.Module) -> None:
    """All sites of an attention."""
    width = _width_of_heads(module)
    quantizers = plan.sites(
        name,
        QuantAttention,
        query_quantizer=width,
        key_quantizer=width,
        value_quantizer=width,
        scores_quantizer=None,
        probabilities_quantizer=None,
        context_quantizer=_width_of_context(module),
    )
    scores = quantizers["scores_quantizer"] or quantizers["probabilities_quantizer"]
    if scores is not None and getattr(module, "sinks", None) is not None:
        raise ValueError(
            f"asymq.prepare: {scores.name}: this attention has sinks, which quantized scores and "
            "probabilities do not know: leave both out (skip '*.scores_quantizer' and "
            "'*.probabilities_quantizer')"
        )


def _width_of_heads(attention: nn.Module) -> int | None:
    for name in ("head_dim", "attention_head_size", "head_size"):
        width = getattr(attention, name, None)
        if isinstance(width, int):
            return width
    return None


def _width_of_context(attention: nn.Module) -> int | None:
    """Of all heads together: what its projection takes, or what as many queries are."""
    for names, side in (
        (("o_proj", "out_proj", "dense", "c_proj"), "input"),
        (("q_proj", "query", "q_lin", "q"), "output"),
    ):
        for name in names:
            width = channels_of(getattr(attention, name, None), side)
            if width is not None:
                return width
    return None


def channels_of(layer: nn.Module | None, side: str) -> int | None:
    """Size of the last axis of a layer's "input" or "output"; None: not known."""
    if layer is not None and is_adapter(layer):
        layer = layer.get_submodule("base_layer")
    base = registry.find(type(layer)) if isinstance(layer, nn.Module) else None
    if layer is None or base is None or not issubclass(base, QuantLayer) or base.left_alone(layer):
        return None
    return base.input_channels(layer) if side == "input" else base.output_channels(layer)
