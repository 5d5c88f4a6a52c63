"""First ranges from data: `calibrate`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asymq.layers import quantized_parameters
from asymq.models.root import Prepared, warn_of_unreached
from asymq.quantizers import (
    OFF,
    QUANTIZING,
    QuantAct,
    Quantizer,
    is_split,
    named_quantizers,
)
from asymq.wrappers import unwrap


def calibrate(model: nn.Module, batches: Iterable[Any], force_zero: bool = True) -> None:
    """Sets every range, and with it the first values of its parameters, and turns quantizing on.

    batches: what the model is called with: an input tensor, a dict passed as ``model(**batch)``, or
    a tuple or list of which the first is one of these, as a DataLoader of (x, y) gives them.

    Activations get the smallest and largest value seen over `batches`, in evaluation mode with
    weights already quantized; zero is forced into the range unless `force_zero` is False. Symmetric
    weights get the largest |w| of each range, others their own minimum and maximum. Weights of
    normalization layers stay in float meanwhile and get their own minimum and maximum. Dynamic
    ranges need no data: their factors become 1. A second calibration starts afresh.

    Warns, with names, of quantizers that no batch reached, which stay as they were, and of those
    whose data have no width (a weight of zeros, a constant output): they get a range all the same,
    as wide as torch's own initialization of the weight, or from -1 to 1.

    ValueError, with every range and state as before: no quantizer, no batch, NaN or infinite values
    (names the quantizer). RuntimeError, likewise: ranges that are split among processes.
    """
    model = unwrap(model)
    quantizers = list(named_quantizers(model))
    if not quantizers:
        raise ValueError("asymq.calibrate: the model has no quantizers; call asymq.prepare first")
    for _, quantizer in quantizers:
        quantizer.need_whole()
    with torch.no_grad(), _undone_on_error(model, quantizers), evaluating(model):
        for root in _roots(model):
            root.expect_reached = False  # calibration itself says what its batches did not reach
        without_width = _calibrate_weights(model, force_zero)
        observing = [(n, q) for n, q in quantizers if isinstance(q, QuantAct) and not q.live]
        for _, quantizer in quantizers:
            quantizer.reached = False
            quantizer.state = QUANTIZING if quantizer.kind == "weight" else OFF
        for _, quantizer in observing:
            quantizer.start_observing()
        _run(model, batches)
        unseen = []
        for name, quantizer in observing:
            observed = quantizer.take_observed()
            if observed is None:
                unseen.append(name)
            elif not _set_range(quantizer, *observed, force_zero):
                without_width.append(quantizer.label)
        for _, quantizer in quantizers:
            quantizer.state = QUANTIZING
            if quantizer.live:
                quantizer.set_factors()
    _warn(model, unseen, without_width)


def _warn(model: nn.Module, unseen: list[str], without_width: list[str]) -> None:
    """What calibration could not do, with names."""
    if without_width:
        warnings.warn(
            f"asymq.calibrate: the data of {', '.join(without_width)} have no width (they are "
            "zeros, or closer together than eps lets a grid be), and say nothing of the range that "
            "training needs: each got a typical one. Calibrate again after some steps in float, "
            "give a smaller eps, or leave them out (skip)",
            stacklevel=3,
        )
    if unseen:
        warnings.warn(
            f"asymq.calibrate: no data reached {', '.join(unseen)}; using them raises an error "
            "unless they were calibrated before",
            stacklevel=3,
        )
    warn_of_unreached(model, "calibration", besides=unseen)


def _calibrate_weights(model: nn.Module, force_zero: bool) -> list[str]:
    """Names of the weights' quantizers whose weight has no width."""
    weights: dict[Quantizer, Tensor] = {}
    for _, quantizer, parameter in quantized_parameters(model):
        weights.setdefault(quantizer, parameter)
    without_width = []
    for quantizer, weight in weights.items():
        whole = weight.full_tensor() if is_split(weight) else weight
        if not _set_range(quantizer, *quantizer.extrema(whole), force_zero):
            without_width.append(quantizer.label)
    return without_width


def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if isinstance(batch, Tensor):
            model(batch.to(device))
        elif isinstance(batch, Mapping):
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        else:
            raise ValueError(
                "asymq.calibrate: a batch must be a tensor or a dict of the model's arguments, got "
                f"{type(batch).__name__}; a generator makes them of others: "
                "(batch.inputs for batch in batches)"
            )
    if count == 0:
        raise ValueError("asymq.calibrate: needs at least one batch, got none")


def _set_range(quantizer: Quantizer, low: Tensor, high: Tensor, force_zero: bool) -> bool:
    """Whether the data say anything of the range."""
    if not bool((low.isfinite() & high.isfinite()).all()):
        what = "an activation" if isinstance(quantizer, QuantAct) else "the weight"
        raise ValueError(
            f"asymq.calibrate: {quantizer.label}: {what} has NaN or infinite values: its "
            f"range would be [{low.min().item()}, {high.max().item()}]"
        )
    # The weights of a trained norm lie around 1: zero would cost them most of their range.
    force_zero = force_zero and quantizer.kind != "norm_weight"
    return quantizer.set_range_of_data(low, high, force_zero)


def _roots(model: nn.Module) -> list[Prepared]:
    return [module for module in model.modules() if isinstance(module, Prepared)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _undone_on_error(model: nn.Module, quantizers: list[tuple[str, Quantizer]]) -> Iterator[None]:
    """Gives every quantizer back its ranges, calibrated state and state if the body raises."""
    expecting = [root for root in _roots(model) if root.expect_reached]
    before = [
        (q, {k: v.clone() for k, v in q.range_tensors().items()}, q.calibrated, q.state, q.reached)
        for _, q in quantizers
    ]
    try:
        yield
    except BaseException:
        for root in expecting:
            root.expect_reached = True
        for quantizer, tensors, calibrated, state, reached in before:
            for name, tensor in quantizer.range_tensors().items():
                tensor.copy_(tensors[name])
            quantizer.take_observed()
            quantizer.calibrated, quantizer.state, quantizer.reached = calibrated, state, reached
        raise
