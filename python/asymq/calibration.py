"""First ranges from data: `calibrate`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asymq._arguments import is_integer, is_number
from asymq.layers import Quantized, quantized_parameters
from asymq.models.root import Prepared, warn_of_unreached
from asymq.quantizers import (
    EXACT,
    METHODS,
    OFF,
    QUANTIZING,
    Observer,
    QuantAct,
    Quantizer,
    is_split,
    named_quantizers,
)
from asymq.wrappers import evaluating, unwrap


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    force_zero: bool = True,
    *,
    method: str = "min_max",
    weight_method: str = "min_max",
    percentile: float = 99.99,
    skip_tokens: int = 0,
) -> None:
    """Sets every range, and with it the first values of its parameters, and turns quantizing on.

    batches: what the model is called with: an input tensor, a dict passed as ``model(**batch)``, or
    a tuple or list of which the first is one of these, as a DataLoader of (x, y) gives them.

    Activations get what `method` makes of the values seen over `batches`, in evaluation mode with
    weights already quantized, and weights what `weight_method` makes of their own, each range by
    itself:

    - "min_max": the smallest and the largest value, symmetric the largest |x|;
    - "percentile": the quantiles of 100 - percentile and of percentile %, symmetric that of |x|,
      with linear interpolation; percentile lies in (50, 100];
    - "mse": the range [a·min, a·max], a = 0.01, 0.02, ..., 1, with the least squared error;
    - "lsq": the first values of LSQ, symmetric s = 2·mean|x|/sqrt((k - 1)/2), and of LSQ+, the mean
      ± 3 standard deviations, no wider than min_max.

    Zero is then put into an asymmetric range unless `force_zero` is False, for mse before it
    searches. Weights of normalization layers stay in float meanwhile, and zero is not put into
    their ranges. Dynamic ranges need no data: their factors become 1. A second calibration starts
    afresh.

    "percentile" and "mse" keep up to 2^20 values of a site, and are exact for so many. Beyond that,
    and for a weight whose single range has more, each range has a histogram of 8,192 bins (64 KiB)
    on the device, whose width doubles as the data widen: quantiles are off by one bin at most.
    Nothing waits for the device before the last batch.

    Positions that an attention_mask of two axes in the batch hides do not count, nor do the first
    `skip_tokens` that it shows of each sequence. Positions are axis 1 of activations of three axes,
    in attention axis 2 of four; of scores and probabilities `skip_tokens` leaves out queries, the
    mask keys, too. With a mask or token ids in the batch also [batch, tokens] at the front of other
    tensors is found, flattened or not.

    Warns, with names, of quantizers that no batch reached, which stay as they were, and of those
    whose data have no width (a weight of zeros, a constant output): they get a range all the same,
    as wide as torch's own initialization of the weight, or from -1 to 1.

    ValueError, with every range and state as before: no quantizer, no batch, unknown methods, a
    percentile or skip_tokens that cannot be, NaN or infinite values (names the quantizer).
    RuntimeError, likewise: ranges that are split among processes.
    """
    _check_options(method, weight_method, percentile, skip_tokens)
    model = unwrap(model)
    quantizers = list(named_quantizers(model))
    if not quantizers:
        raise ValueError("asymq.calibrate: the model has no quantizers; call asymq.prepare first")
    for _, quantizer in quantizers:
        quantizer.need_whole()

    def observer(quantizer: Quantizer) -> Observer:
        # The weights of a trained norm lie around 1: zero would cost them most of their range.
        zero = force_zero and quantizer.kind != "norm_weight"
        name = method if isinstance(quantizer, QuantAct) else weight_method
        return METHODS[name](quantizer.spec, zero, percentile)

    with torch.no_grad(), _undone_on_error(model, quantizers), evaluating(model):
        for root in _roots(model):
            root.expect_reached = False  # calibration itself says what its batches did not reach
        without_width = _calibrate_weights(model, observer, force_zero)
        for _, quantizer in quantizers:
            quantizer.reached = False
            quantizer.state = QUANTIZING if quantizer.kind == "weight" else OFF
        unseen, more = _calibrate_activations(model, observer, batches, skip_tokens)
        for _, quantizer in quantizers:
            quantizer.state = QUANTIZING
            if quantizer.live:
                quantizer.set_factors()
    _warn(model, unseen, without_width + more)


def _calibrate_activations(
    model: nn.Module,
    observer: Callable[[Quantizer], Observer],
    batches: Iterable[Any],
    skip_tokens: int,
) -> tuple[list[str], list[str]]:
    """Names of those that no batch reached, and labels of those whose data have no width."""
    observing = [
        (n, q, observer(q))
        for n, q in named_quantizers(model)
        if isinstance(q, QuantAct) and not q.live
    ]
    positions = _Positions(model, skip_tokens)
    for _, quantizer, seen in observing:
        quantizer.start_observing(functools.partial(_see, seen, quantizer, positions))
    _run(model, batches, positions)
    unseen, without_width = [], []
    for name, quantizer, seen in observing:
        quantizer.take_observed()
        if seen.extrema() is None:
            unseen.append(name)
        elif not _set_range(quantizer, [seen]):
            without_width.append(quantizer.label)
    return unseen, without_width


def _check_options(method: str, weight_method: str, percentile: float, skip_tokens: int) -> None:
    for name, value in (("method", method), ("weight_method", weight_method)):
        if value not in METHODS:
            raise ValueError(
                f"asymq.calibrate: {name} must be one of {', '.join(METHODS)}, got {value!r}"
            )
    if not (is_number(percentile) and 50 < percentile <= 100):
        raise ValueError(f"asymq.calibrate: percentile must lie in (50, 100], got {percentile!r}")
    if not (is_integer(skip_tokens) and skip_tokens >= 0):
        raise ValueError(
            f"asymq.calibrate: skip_tokens must be an integer of at least 0, got {skip_tokens!r}"
        )


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


def _calibrate_weights(
    model: nn.Module, observer: Callable[[Quantizer], Observer], force_zero: bool
) -> list[str]:
    """Names of the weights' quantizers whose weight has no width."""
    without_width = []
    for quantizer, weight in _weights(model):
        if weight.numel() == 0:
            quantizer.set_range_of_data(*quantizer.extrema(weight), force_zero)
            without_width.append(quantizer.label)
            continue
        observers = []
        for rows in _parts(quantizer, weight):
            observers.append(observer(quantizer))
            observers[-1].see(rows)
        if not _set_range(quantizer, observers):
            without_width.append(quantizer.label)
    return without_width


def _weights(model: nn.Module) -> Iterator[tuple[Quantizer, Tensor]]:
    """Every weight with a quantizer of a stored range, whole."""
    seen = set()
    for _, quantizer, parameter in quantized_parameters(model):
        if quantizer not in seen and not quantizer.live:
            seen.add(quantizer)
            yield quantizer, parameter.full_tensor() if is_split(parameter) else parameter.detach()


def _parts(quantizer: Quantizer, weight: Tensor) -> Iterator[Tensor]:
    """The rows of a weight, so many at a time as are looked at exactly."""
    rows = quantizer.rows(weight)
    yield from rows.split(max(1, EXACT // max(1, rows.shape[1])))


class _Positions:
    """Which positions of the present batch count."""

    def __init__(self, model: nn.Module, skip: int):
        self._skip = skip
        self._axes = {
            quantizer: module.token_axes[name]
            for module in model.modules()
            if isinstance(module, Quantized)
            for name, quantizer in module.named_children()
            if name in module.token_axes
        }
        self._kept: Tensor | None = None  # bool, [batch, tokens]; None: nothing is known

    def start(self, batch: Tensor | Mapping[str, Any]) -> None:
        named = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        mask, ids = named.get("attention_mask"), named.get("input_ids")
        self._kept = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._kept = mask.bool()
        elif self._skip and isinstance(ids, Tensor) and ids.dim() == 2:
            if not ids.is_floating_point():
                self._kept = torch.ones_like(ids, dtype=torch.bool)

    def counted(self, quantizer: Quantizer, x: Tensor) -> Tensor | None:
        """bool, to be broadcast over the activation x; None: all count."""
        kept, (axis, *others) = self._kept, self._axes.get(quantizer, (1,))
        if kept is None:
            if not self._skip or (x.dim() != 3 and axis == 1):
                return None
            kept = torch.ones(1, x.shape[axis], dtype=torch.bool, device=x.device)
        counted = kept & (kept.cumsum(1) > self._skip)
        if x.dim() == 2 and len(x) == counted.numel():
            return counted.to(x.device).view(-1, 1)
        found = [_along(x, axis, counted), *(_along(x, other, kept) for other in others)]
        masks = [mask for mask in found if mask is not None]
        return functools.reduce(torch.logical_and, masks) if masks else None


def _along(x: Tensor, axis: int, of_positions: Tensor) -> Tensor | None:
    """[batch, tokens] on the axes 0 and `axis` of x; None: those are others."""
    batch, tokens = of_positions.shape
    if x.dim() < 3 or x.shape[axis] != tokens or (batch != 1 and len(x) not in (1, batch)):
        return None
    if len(x) == 1:  # as the positions' embeddings, for all sequences
        of_positions = of_positions.any(0, keepdim=True)
    shape = [1] * x.dim()
    shape[0], shape[axis] = of_positions.shape
    return of_positions.to(x.device).view(shape)


def _see(observer: Observer, quantizer: Quantizer, positions: _Positions, x: Tensor) -> None:
    counted = positions.counted(quantizer, x)
    observer.see(
        quantizer.rows(x), None if counted is None else quantizer.rows(counted.expand(x.shape))
    )


def _run(model: nn.Module, batches: Iterable[Any], positions: _Positions) -> None:
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        batch = batch_of(model, batch, "asymq.calibrate")
        positions.start(batch)
        call(model, batch)
    if count == 0:
        raise ValueError("asymq.calibrate: needs at least one batch, got none")


def batch_of(model: nn.Module, batch: Any, what: str) -> Tensor | dict[str, Any]:
    """What `call` takes, on the model's device, of a batch as `calibrate` takes it. ValueError,
    that of `what`, where it is none."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    raise ValueError(
        f"{what}: a batch must be a tensor or a dict of the model's arguments, got "
        f"{type(batch).__name__}; a generator makes them of others: "
        "(batch.inputs for batch in batches)"
    )


def call(model: nn.Module, batch: Tensor | dict[str, Any]) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def _set_range(quantizer: Quantizer, observers: list[Observer]) -> bool:
    """Whether the data say anything of the range, of which each observer saw some rows."""
    extrema = [extrema for observer in observers if (extrema := observer.extrema())]
    low, high = map(torch.cat, zip(*extrema, strict=True))
    if not bool((low.isfinite() & high.isfinite()).all()):
        what = "an activation" if isinstance(quantizer, QuantAct) else "the weight"
        raise ValueError(
            f"asymq.calibrate: {quantizer.label}: {what} has NaN or infinite values: its "
            f"range would be [{low.min().item()}, {high.max().item()}]"
        )
    low, high = map(torch.cat, zip(*(observer.ends() for observer in observers), strict=True))
    low, high = quantizer.of_ranges(low, high)
    return quantizer.set_range_of_data(low, high, observers[0].force_zero)


def _roots(model: nn.Module) -> list[Prepared]:
    return [module for module in model.modules() if isinstance(module, Prepared)]


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
