"""What quantizers run: the operators, or the same functions in another form."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from asymq import ops

NAMES = ("operators", "reference", "unfused")
_thread = threading.local()


def namespace() -> Any:
    """Where the fake-quantize functions of this thread come from."""
    return getattr(_thread, "namespace", ops)


def may_fuse() -> bool:
    """Whether kernels may do more than quantize in this thread."""
    return getattr(_thread, "fuse", True)


def _use(functions: Any, fuse: bool) -> tuple[Any, bool]:
    """Switches this thread; returns what it used before."""
    before = namespace(), may_fuse()
    _thread.namespace, _thread.fuse = functions, fuse
    return before


class use_functions:
    """Chooses what quantizers run in this thread, from the call on, or within a ``with`` block.

    "operators" (the default): asymq's kernels, one for several steps where there is such a kernel.
    "unfused": single operators. "reference": `asymq.reference`, single operations of PyTorch, which
    exporters can read.
    """

    def __init__(self, which: str):
        if which not in NAMES:
            raise ValueError(
                f"asymq.use_functions: must be one of {', '.join(NAMES)}, got {which!r}"
            )
        functions = importlib.import_module("asymq.reference") if which == "reference" else ops
        self._before = _use(functions, fuse=which == "operators")

    def __enter__(self) -> use_functions:
        return self

    def __exit__(self, *_) -> None:
        _use(*self._before)


@contextmanager
def use_namespace(functions: Any) -> Iterator[Any]:
    """Quantizers take their functions from any object that has them, one operation each; only
    `asymq.ops` may fuse."""
    before = _use(functions, fuse=functions is ops)
    try:
        yield functions
    finally:
        _use(*before)
