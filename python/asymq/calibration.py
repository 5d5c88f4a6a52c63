"""First ranges from data: `calibrate`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from asymq.modules import QuantLayer
from asymq.quantizer import OFF, QUANTIZING, Quantizer, named_quantizers

# No range is narrower than this, nor than k·eps, where the guard of the scale would hold it.
LEAST_WIDTH = 1e-6


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]], force_zero: bool = True
) -> None:
    """Sets every range, and with it the first values of its parameters, and turns quantizing on.

    Activations get the smallest and largest value seen over `batches`, each an input tensor or a
    dict passed as ``model(**batch)``, in evaluation mode with weights already quantized; zero is
    forced into the range unless `force_zero` is False. Symmetric weights get the largest |w| of
    each range, others their own minimum and maximum. LayerNorm weights stay in float meanwhile and
    get their own minimum and maximum. A second calibration starts afresh. Quantizers of activations
    that saw no data stay as they were, with a warning that names them.

    ValueError, with every range and state as before: no quantizer, no batch, NaN or infinite values
    (names the quantizer).
    """
    quantizers = list(named_quantizers(model))
    if not quantizers:
        raise ValueError("asymq.calibrate: the model has no quantizers; call asymq.prepare first")
    with _undone_on_error(model, quantizers), _evaluating(model):
        for layer in model.modules():
            if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None:
                _range_of_weight(layer.weight_quantizer, _whole(layer.weight), force_zero)
        for _, quantizer in quantizers:
            if quantizer.kind == "activation":
                quantizer.start_observing()
            else:
                quantizer.state = OFF if quantizer.kind == "norm_weight" else QUANTIZING
        _run(model, batches)
        unseen = []
        for name, quantizer in quantizers:
            if quantizer.kind == "activation" and not _range_of_activation(quantizer, force_zero):
                unseen.append(name)
            quantizer.state = QUANTIZING
    if unseen:
        warnings.warn(
            f"asymq.calibrate: no data reached {', '.join(unseen)}; using them raises an error "
            "unless they were calibrated before",
            stacklevel=2,
        )


def _run(model: nn.Module, batches: Iterable) -> None:
    device = next(model.parameters()).device
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        if isinstance(batch, Tensor):
            model(batch.to(device))
        elif isinstance(batch, Mapping):
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        else:
            raise ValueError(
                "asymq.calibrate: a batch must be a tensor or a dict of the model's arguments, got "
                f"{type(batch).__name__}"
            )
    if count == 0:
        raise ValueError("asymq.calibrate: needs at least one batch, got none")


def _whole(weight: Tensor) -> Tensor:
    """A weight that FSDP2 has split among processes is gathered."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _range_of_weight(quantizer: Quantizer, weight: Tensor, force_zero: bool) -> None:
    if quantizer.spec.dynamic:
        return
    low, high = quantizer.extrema(weight)
    _need_finite(quantizer, low, high, "the weight")
    if quantizer.spec.symmetric:
        high = _symmetric_end(quantizer, low, high)
    else:
        if quantizer.kind == "norm_weight":
            # As in a fresh model, where all are 1: one value has no width, but a distance from 0.
            zero = high - low < LEAST_WIDTH
        else:
            zero = torch.full_like(low, force_zero, dtype=torch.bool)
        low, high = _widen(quantizer, *_include_zero(low, high, zero))
    quantizer.set_range(low, high)


def _range_of_activation(quantizer: Quantizer, force_zero: bool) -> bool:
    """Whether there were data."""
    observed = quantizer.take_observed()
    if quantizer.spec.dynamic or observed is None:
        return observed is not None
    low, high = observed
    _need_finite(quantizer, low, high, "an activation")
    if quantizer.spec.symmetric:
        high = _symmetric_end(quantizer, low, high)
    else:
        if force_zero:
            low, high = _include_zero(low, high, torch.ones_like(low, dtype=torch.bool))
        low, high = _widen(quantizer, low, high)
    quantizer.set_range(low, high)
    return True


def _include_zero(low: Tensor, high: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(where, low.clamp(max=0), low), torch.where(where, high.clamp(min=0), high)


def _widen(quantizer: Quantizer, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low, torch.maximum(high, low + _least_width(quantizer))


def _symmetric_end(quantizer: Quantizer, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(-low, high).clamp(min=max(LEAST_WIDTH, _least_width(quantizer) / 2))


def _least_width(quantizer: Quantizer) -> float:
    return max(LEAST_WIDTH, quantizer.spec.steps * quantizer.spec.eps)


def _need_finite(quantizer: Quantizer, low: Tensor, high: Tensor, what: str) -> None:
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError(
            f"asymq.calibrate: {quantizer.label}: {what} has NaN or infinite values: its "
            f"range would be [{low.min().item()}, {high.max().item()}]"
        )


@contextmanager
def _evaluating(model: nn.Module):
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _undone_on_error(model: nn.Module, quantizers: list[tuple[str, Quantizer]]):
    """Gives every quantizer back its ranges, calibrated state and state if the body raises."""
    before = [
        ({k: v.clone() for k, v in q.range_tensors().items()}, q.calibrated, q.state)
        for _, q in quantizers
    ]
    try:
        yield
    except BaseException:
        for (_, quantizer), (tensors, calibrated, state) in zip(quantizers, before, strict=True):
            for name, tensor in quantizer.range_tensors().items():
                tensor.copy_(tensors[name])
            quantizer.take_observed()
            quantizer.calibrated, quantizer.state = calibrated, state
        raise
