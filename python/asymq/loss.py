"""The loss of a causal language model over quantized logits, for transformers' interface."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from asymq import ops
from asymq.modules import unquantized
from asymq.quantizer import is_fusible


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
    if found is None or not is_fusible(found[1]):
        options = {"ignore_index": ignore_index, "shift_labels": shift_labels, **kwargs}
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **options)
    raw, quantizer = found
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.flatten().to(raw.device)
    losses = ops.quantized_cross_entropy(
        raw.view(-1, vocab_size),
        shift_labels,
        quantizer.range_arguments(),
        ignore_index=ignore_index,
    )
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch
