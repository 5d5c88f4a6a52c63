"""One result for several users of a quantizer within one forward of a model, and for several
forwards that generate."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

# What gives the range tensors by name, where they are asked for.
Ranges = Callable[[], Mapping[str, Tensor]]

_thread = threading.local()


@contextmanager
def sharing() -> Iterator[None]:
    """One forward of a model in this thread, within which a quantizer with several users quantizes
    what they all give it once. Nothing outlives it."""
    if getattr(_thread, "results", None) is not None:
        yield
        return
    _thread.results = {}
    try:
        yield
    finally:
        _thread.results = None


def results() -> dict[Any, Any] | None:
    """What quantizers with several users keep for the rest of this thread's forward; None: there is
    none, or a compiler merges equal operations by itself."""
    if torch.compiler.is_compiling():
        return None
    kept = getattr(_thread, "results", None)
    return _of_backward() if kept is None else kept


def _of_backward() -> dict[Any, Any] | None:
    """The same within a backward, where a checkpointed region runs again, and must share as it did
    the first time."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return None
    backwards = _thread.__dict__.setdefault("backwards", {})
    if task not in backwards:
        backwards[task] = {}
        Variable._execution_engine.queue_callback(lambda: backwards.pop(task))
    return backwards[task]


def once(
    owner: object,
    uses: float,
    x: Tensor,
    ranges: Ranges,
    quantize: Callable[[Tensor], Tensor],
) -> Tensor:
    """quantize(x), computed for the first of `uses` with the same x under the same circumstances,
    and kept until the last of them."""
    kept = results()
    if kept is None:
        return quantize(x)
    key = _key(owner, x, ranges)
    # Beside x, which must live as long as its identity stands for it.
    result, _, left = kept.pop(key, None) or (quantize(x), x, uses)
    if left > 1:
        kept[key] = result, x, left - 1
    return result


@contextmanager
def provided(owner: object, uses: float, x: Tensor, ranges: Ranges) -> Iterator[None]:
    """Within it, `once` returns x itself to the `uses` of `owner`: x is quantized already, by a
    kernel that did more than that. RuntimeError at its end: they were fewer, and x may have been
    quantized twice."""
    kept = results()
    assert kept is not None
    key = _key(owner, x, ranges)
    kept[key] = x, x, uses
    try:
        yield
    except BaseException:
        kept.pop(key, None)
        raise
    if kept.pop(key, None) is not None:
        raise RuntimeError(
            "asymq: a tensor that was quantized in advance did not reach all of its layers as it "
            "was; call asymq.use_functions('unfused') first"
        )


@contextmanager
def generating() -> Iterator[None]:
    """Forwards of a model in this thread that record no graph, for which `unchanged` keeps weights.
    Nothing outlives it."""
    outer = getattr(_thread, "unchanged", None)
    _thread.unchanged = {}
    try:
        yield
    finally:
        _thread.unchanged = outer


def unchanged(
    owner: object, x: Tensor, ranges: Ranges, quantize: Callable[[Tensor], Tensor]
) -> Tensor:
    """quantize(x), while a model is `generating` computed once for all of its forwards that have
    the same x and ranges."""
    kept = getattr(_thread, "unchanged", None)
    if kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return quantize(x)
    versions = [_version(tensor) for tensor in (x, *ranges().values())]
    result, *of = kept.get(id(owner), (None, None, None))
    if of[0] is not x or of[1] != versions:
        result = quantize(x)
        kept[id(owner)] = result, x, versions
    return result


def _key(owner: object, x: Tensor, ranges: Ranges) -> tuple:
    versions = [_version(tensor) for tensor in (x, *ranges().values())]
    return (id(owner), id(x), *versions, *_circumstances())


def _circumstances() -> tuple:
    """What a result depends on beside x and the range: a graph is recorded or not, a checkpointed
    region keeps what it computes in its own way, a backward computes it again."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._current_graph_task_id(),
    )


def _version(tensor: Tensor) -> int:
    """Changes with the tensor, except in inference mode, where nothing can be trained."""
    return 0 if tensor.is_inference() else tensor._version
