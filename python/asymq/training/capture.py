"""A whole training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from asymq._arguments import is_integer

T = TypeVar("T")


def capture_step(step: Callable[[], T], warmup: int = 3) -> Callable[[], T]:
    """Captures a whole training step in a CUDA graph: what a small model's step costs is launches.

    step: forward, backward and optimizer step on tensors that stay where they are (copy each batch
    into them), with an optimizer made with capturable=True, `zero_grad()` first, and nothing that
    reads a GPU's value, as `item()` does. It is called `warmup` times, which train as any step, and
    recorded once, which does not. The function returned repeats it, and what it returns is
    overwritten by the next call.

    ValueError: `warmup` is no integer of at least 0. RuntimeError: there is no GPU. torch's errors
    where a step cannot be captured.
    """
    if not (is_integer(warmup) and warmup >= 0):
        raise ValueError(
            f"asymq.capture_step: warmup must be an integer of at least 0, got {warmup!r}"
        )
    if not torch.cuda.is_available():
        raise RuntimeError("asymq.capture_step: needs a CUDA GPU, and torch sees none")
    # Work before a capture belongs on the stream of its kind, so that no allocation is shared.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> T:
        graph.replay()
        return result

    return replay
