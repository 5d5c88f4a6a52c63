"""Distillation: the quantized model learns from a float one, by default from itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymq._arguments import is_number
from asymq.layers import fused
from asymq.layers.loss import causal_lm_loss, teaching, unquantized
from asymq.quantizers import OFF, Quantizer, named_quantizers
from asymq.wrappers import evaluating, unwrap, wrapper_of

IGNORED = -100
_NAME = "asymq.SelfDistillation"


class SelfDistillation:
    """The loss of a quantized model against its teacher, the model itself with every quantizer off
    (LLM-QAT, Liu et al. 2023, has a second copy of it; Hinton et al. 2015).

        loss = asymq.SelfDistillation(model)
        loss(**batch).backward()

    The mean over the counted positions of T²·KL(softmax(teacher/T) || softmax(student/T)), T the
    temperature, and `cross_entropy` times the model's own loss. Counted are, for a causal language
    model, with labels the positions whose next label is not -100 (the last position never), without
    labels those that attention_mask keeps, all if there is none. Of other models a label counts at
    its own place, and logits of two axes are one position a sample. num_items_in_batch in the batch
    divides the sum in place of the count, as in transformers' losses.

    The teacher runs under no_grad in evaluation mode, in the same autocast, with peft's adapters
    off; states and modes are restored, also when it raises. It is a float model only as long as the
    weights do not learn: parameters that require grad and are neither ranges nor adapters' are a
    ValueError, unless `teacher` is given: a module, or a callable that takes the batch, returning
    logits or something with .logits.

    hidden: names of modules, with wildcards, whose outputs (of a tuple the first tensor) add the
    mean squared difference of counted positions to the teacher's, each with weight 1.

    Works on a model in DistributedDataParallel, FSDP2 or torch.compile (then without `hidden`),
    with checkpointing and accumulation, and as the loss of a transformers Trainer:

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return asymq.SelfDistillation(model)(**inputs, num_items_in_batch=num_items_in_batch)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        teacher: nn.Module | Callable | None = None,
        hidden: Sequence[str] = (),
    ):
        if not (is_number(temperature) and temperature > 0):
            raise ValueError(
                f"{_NAME}: temperature must be a finite number above 0, got {temperature!r}"
            )
        if not (is_number(cross_entropy) and cross_entropy >= 0):
            raise ValueError(
                f"{_NAME}: cross_entropy must be a finite number of at least 0, got "
                f"{cross_entropy!r}"
            )
        if not any(True for _ in named_quantizers(model)):
            raise ValueError(f"{_NAME}: the model has no quantizers: prepare it first")
        self.model, self.teacher = model, teacher
        self.temperature, self.cross_entropy = temperature, cross_entropy
        self.hidden = tuple(hidden)
        self._need_float_teacher()
        if self.hidden:
            if any(wrapper.title == "torch.compile" for wrapper in _wrappers(model)):
                raise ValueError(
                    f"{_NAME}: hidden needs the outputs of modules, which a compiled model hides: "
                    "give the model before torch.compile"
                )
            if teacher is not None and not isinstance(teacher, nn.Module):
                raise ValueError(f"{_NAME}: hidden needs a teacher that is a module")
            for of in (model, teacher):
                if isinstance(of, nn.Module):
                    self._observed(of)

    def __call__(self, *, num_items_in_batch: Tensor | int | None = None, **batch) -> Tensor:
        """The loss of a batch, a scalar: the batch is what the model's forward takes."""
        labels = batch.get("labels")
        if self.cross_entropy > 0 and labels is None:
            raise ValueError(f"{_NAME}: cross_entropy needs labels in the batch")
        self._need_float_teacher()
        causal = _is_causal(self.model)
        # What a causal model does with labels is its loss; others make inputs of them, too.
        inputs = {k: v for k, v in batch.items() if k != "labels" or not causal}
        target, target_hidden = self._teach(inputs)
        own = dict(batch) if self.cross_entropy > 0 else inputs
        if self.cross_entropy > 0 and num_items_in_batch is not None:
            own["num_items_in_batch"] = num_items_in_batch
        with self._watch(self.model) as found_hidden:
            output = self.model(**own)
        logits = _logits_of(output)
        counted = _counted(logits, labels, batch.get("attention_mask"), causal)
        count = counted.sum() if num_items_in_batch is None else num_items_in_batch
        if isinstance(count, Tensor):
            count = count.to(logits.device)
        loss = self._divergence(logits, target, counted).sum() / count
        for name, found in found_hidden.items():
            difference = _mean_square(name, found, target_hidden[name], counted)
            loss = loss + difference.sum() / count
        if self.cross_entropy > 0:
            loss = loss + self.cross_entropy * _loss_of(output)
        return loss

    def _divergence(self, logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """Of every position, 0 where it does not count."""
        if target.shape != logits.shape:
            raise ValueError(
                f"{_NAME}: the teacher's logits must have the model's shape {[*logits.shape]}, got "
                f"{[*target.shape]}"
            )
        raw, quantizer = unquantized(logits) or (logits, None)
        labels = torch.where(counted, 0, IGNORED).flatten()
        how = quantizer, self.temperature, IGNORED, logits.shape[-1]
        return fused.kl_div(raw, target.to(raw), labels, *how)

    def _teach(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The teacher's logits, and its hidden outputs."""
        with torch.no_grad():
            if self.teacher is None:
                with _without_quantizers(self.model), teaching(), self._watch(self.model) as hidden:
                    return _logits_of(self.model(**inputs)).detach(), hidden
            if not isinstance(self.teacher, nn.Module):
                return _logits_of(self.teacher(**inputs)).detach(), {}
            with evaluating(self.teacher), self._watch(self.teacher) as hidden:
                return _logits_of(self.teacher(**inputs)).detach(), hidden

    def _need_float_teacher(self) -> None:
        if self.teacher is not None:
            return
        for name, module in self.model.named_modules():
            if isinstance(module, Quantizer):
                continue
            for own, parameter in module.named_parameters(name, recurse=False):
                if parameter.requires_grad and ".lora_" not in own:
                    raise ValueError(
                        f"{_NAME}: {own} learns, so that the model without its quantizers is no "
                        "fixed teacher: call asymq.freeze_weights(model), or give teacher= a float "
                        "model"
                    )

    def _observed(self, model: nn.Module) -> dict[str, nn.Module]:
        modules = dict(unwrap(model).named_modules())
        found: dict[str, nn.Module] = {}
        for pattern in self.hidden:
            matching = [name for name in modules if fnmatchcase(name, pattern)]
            if not matching:
                raise ValueError(f"{_NAME}: hidden: no module is called {pattern!r}")
            found.update((name, modules[name]) for name in matching)
        return found

    @contextlib.contextmanager
    def _watch(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """What the hidden modules return while this is open."""
        outputs: dict[str, Tensor] = {}

        def keep(name):
            def hook(_, __, output):
                outputs[name] = output[0] if isinstance(output, tuple) else output

            return hook

        with contextlib.ExitStack() as stack:
            if self.hidden:
                for name, module in self._observed(model).items():
                    stack.callback(module.register_forward_hook(keep(name)).remove)
            yield outputs


def _wrappers(model: nn.Module):
    while (wrapper := wrapper_of(model)) is not None:
        yield wrapper
        model = getattr(model, wrapper.attribute)


def _is_causal(model: nn.Module) -> bool:
    """Whether its own loss shifts: position i has the label i + 1."""
    if "transformers" not in type(unwrap(model)).__module__ and not hasattr(model, "loss_type"):
        return False
    from transformers.loss.loss_utils import ForCausalLMLoss

    function = getattr(unwrap(model), "loss_function", None)
    return function in (ForCausalLMLoss, causal_lm_loss)


def _counted(
    logits: Tensor, labels: Tensor | None, attention_mask: Tensor | None, causal: bool
) -> Tensor:
    """bool, the shape of the logits but for their last axis."""
    shape = logits.shape[:-1]
    if labels is not None and not labels.is_floating_point():
        kept = labels != IGNORED
        if causal:
            kept = F.pad(kept[..., 1:], (0, 1), value=False)
        if kept.shape == shape:
            return kept.to(logits.device)
    elif labels is None and attention_mask is not None and attention_mask.shape == shape:
        return attention_mask.to(logits.device).bool()
    return torch.ones(shape, dtype=torch.bool, device=logits.device)


def _mean_square(name: str, found: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Of every counted position, 0 elsewhere."""
    if found.shape[: counted.dim()] != counted.shape or found.shape != target.shape:
        raise ValueError(
            f"{_NAME}: hidden: {name} returns {[*found.shape]}, the teacher's {[*target.shape]}, "
            f"which do not have the positions {[*counted.shape]}"
        )
    wide = torch.promote_types(found.dtype, torch.float32)
    square = (found.to(wide) - target.to(wide)).square()
    return torch.where(counted, square.flatten(counted.dim()).mean(-1), 0)


def _logits_of(output) -> Tensor:
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    )
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{_NAME}: a model must return logits or something with .logits, got "
            f"{type(output).__name__}"
        )
    return logits


def _loss_of(output) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{_NAME}: cross_entropy needs a model that returns its loss of the labels"
        )
    return loss


@contextlib.contextmanager
def _without_quantizers(model: nn.Module) -> Iterator[None]:
    states = [(quantizer, quantizer.state) for _, quantizer in named_quantizers(model)]
    with evaluating(model), _without_adapters(unwrap(model)):
        try:
            for quantizer, _ in states:
                quantizer.state = OFF
            yield
        finally:
            for quantizer, state in states:
                quantizer.state = state


@contextlib.contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """Of peft, around the model or within it."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    elif getattr(model, "_hf_peft_config_loaded", False):
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()
    else:
        yield
