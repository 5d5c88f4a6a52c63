"""What the blocks of transformers' decoders have in common: two residual sums around attention."""

from __future__ import annotations

from inspect import signature
from typing import ClassVar

from torch import nn

from asymq.layers import Quantized
from asymq.layers.attention import QuantAttention
from asymq.models.sites import Plan
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
        scores_quantizer=None,
        probabilities_quantizer=None,
        context_quantizer=width,
    )
