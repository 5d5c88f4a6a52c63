"""The loss of a causal language model over quantized logits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from asymq.layers import fused
from asymq.quantizers import QuantAct

# Logits that a head has returned to what they were before their quantizer: (that, the quantizer,
# the logits' version). Beside the tensors, so that no copy of them brings it along.
_UNQUANTIZED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_thread = threading.local()


@contextmanager
def teaching() -> Iterator[None]:
    """A forward without a graph whose logits a loss reads beside those of one with: aligned as
    those are."""
    before, _thread.aligning = aligning(), True
    try:
        yield
    finally:
        _thread.aligning = before


def aligning() -> bool:
    """Whether a forward of this thread is such a one."""
    return getattr(_thread, "aligning", False)


def keep_unquantized(logits: Tensor, raw: Tensor, quantizer: QuantAct) -> None:
    """Keeps what logits were before their quantizer, as long as they live, if they are part of a
    graph, which keeps it anyway."""
    if logits is not raw and logits.requires_grad and not torch.compiler.is_compiling():
        _UNQUANTIZED[logits] = raw, quantizer, logits._version


def unquantized(logits: Tensor) -> tuple[Tensor, QuantAct] | None:
    """What a head's output was before its quantizer, with the columns that it was padded with, and
    that; None for any other tensor, and for logits that were changed since."""
    if torch.compiler.is_compiling():
        return None
    kept = _UNQUANTIZED.get(logits)
    if kept is None or kept[2] != logits._version:
        return None
    return kept[:2]


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """transformers' ForCausalLMLoss, with the quantizer of the logits in one kernel with the
    cross-entropy where they come from a QuantLogits.

    logits: [batch, tokens, vocab_size]. labels: [batch, tokens], of which the next token's counts,
    or shift_labels, which are shifted already. The mean over the labels that are not ignore_index;
    with num_items_in_batch the sum divided by that.
    """
    found = unquantized(logits)
    if found is None or not found[1].fusible:
        from transformers.loss.loss_utils import ForCausalLMLoss

        options = {"ignore_index": ignore_index, "shift_labels": shift_labels, **kwargs}
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **options)
    raw, quantizer = found
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.flatten().to(raw.device)
    losses = fused.cross_entropy(raw, shift_labels, quantizer, ignore_index, logits.shape[-1])
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch
