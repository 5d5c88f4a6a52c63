"""Where a training step's time, traffic and memory go: what `benchmark.py step --profile` shows.

Three steps are looked at in three ways: torch's profiler times the kernels of every operator call,
a dispatch mode counts the bytes of its tensors, and saved-tensor hooks see what autograd keeps.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STEPS = 3
# The part of a step that an operator belongs to: the first whose pattern its name has.
PARTS = {
    "quantized attention": "quantized_attention",
    "quantized softmax": "quantized_softmax",
    "quantized GELU": "quantized_gelu",
    "quantized cross-entropy": "quantized_cross_entropy",
    "quantized RMSNorm": "quantized_rms_norm",
    "quantized gated unit": "quantized_glu",
    "fake-quantize": "asymq::|fake_quantize",
    "GEMMs": "mm$|linear|matmul|attention",
    "cross-entropy": "log_softmax|nll_loss",
    "softmax": "softmax",
    "LayerNorm": "layer_norm",
    "activation function": "gelu|relu|tanh|pow",
    "embedding": "embedding",
    "optimizer": "foreach|adam|Optimizer",
    "copies": "copy_|clone|cat",
    "rest": "",
}
# An operator with the shapes of its tensors: fake-quantize of scores is another row than of sums.
Call = tuple[str, str]


@dataclass
class Profile:
    wall: float = 0.0  # seconds of a step without the profiler
    busy: float = 0.0  # seconds in which a kernel ran
    launches: int = 0
    seconds: dict[Call, float] = field(default_factory=dict)
    calls: dict[Call, int] = field(default_factory=dict)
    bytes: dict[Call, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)  # bytes, by the module that saved them


def profile(step: Callable, model: nn.Module, wall: float) -> Profile:
    """Of a step of this model that has run before and takes `wall` seconds."""
    result = Profile(wall)
    _time(step, result, next(model.parameters()).is_cuda)
    with _Traffic() as traffic:
        step()
    result.bytes = dict(traffic.bytes)
    result.saved = _saved(step, model)
    return result


def _time(step: Callable, result: Profile, cuda: bool) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    for row in profiler.key_averages(group_by_input_shape=True):
        seconds = row.self_device_time_total if cuda else row.self_cpu_time_total
        if seconds and row.device_type == torch.autograd.DeviceType.CPU:
            call = (row.key, _shapes(row.input_shapes))
            result.seconds[call] = result.seconds.get(call, 0) + seconds / 1e6 / STEPS
            result.calls[call] = result.calls.get(call, 0) + row.count // STEPS
    kernels = [e.time_range for e in profiler.events() if cuda and e.device_type == kind]
    result.launches = len(kernels) // STEPS
    result.busy = _union((k.start, k.end) for k in kernels) / 1e6 / STEPS


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def _shapes(shapes: Iterable) -> str:
    """The two largest tensors' shapes: enough to tell sites apart."""
    found = [s for s in shapes if s and all(isinstance(n, int) for n in s)]
    found = [s for s in found if len(s) > 1 or s[0] > 1]
    largest = sorted(found, key=lambda s: -torch.Size(s).numel())[:2]
    return " ".join("x".join(map(str, s)) for s in largest)


class _Traffic(TorchDispatchMode):
    """Bytes that each operator reads and writes: its tensors' storages, once each. Views move
    nothing; what a kernel reads twice counts once."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[Call, int] = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            call = (function._schema.name, _shapes([list(t.shape) for t in inputs]))
            moved = {t.data_ptr(): t.numel() * t.element_size() for t in [*inputs, *outputs]}
            self.bytes[call] += sum(moved.values())
        return result


def _saved(step: Callable, model: nn.Module) -> dict[str, int]:
    """Bytes kept for the backward by the innermost module that kept them first; not the
    parameters, which are there anyway."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stack, seen = ["loss"], {}
    saved: dict[str, int] = defaultdict(int)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # Keeping the storage keeps its address from being used again.
            if storage.data_ptr() not in seen:
                saved[stack[-1]] += storage.nbytes()
            seen[storage.data_ptr()] = storage
        return tensor

    def leave(*_) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        kind = re.sub(r"\.\d+", ".*", name) or type(module).__name__
        handles.append(module.register_forward_pre_hook(lambda *_, kind=kind: stack.append(kind)))
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step()
    finally:
        for handle in handles:
            handle.remove()
    return dict(saved)


def part(operator: str) -> str:
    return next(name for name, pattern in PARTS.items() if re.search(pattern, operator))


def markdown(result: Profile, name: str, rows: int = 40) -> list[str]:
    """Three tables: parts of the step, its operators by shape, and saved tensors by module."""
    parts: dict[str, list[float]] = {name: [0.0, 0] for name in PARTS}
    for call, seconds in result.seconds.items():
        parts[part(call[0])][0] += seconds
        parts[part(call[0])][1] += result.bytes.get(call, 0)
    lines = [f"## {name}", "", f"A step takes {result.wall * 1e3:.1f} ms."]
    if result.launches:
        lines[-1] += (
            f" In {result.busy * 1e3:.1f} ms of it one of its {result.launches} kernels runs; for "
            f"{max(0.0, result.wall - result.busy) * 1e3:.1f} ms the GPU waits."
        )
    lines += ["", "| part | ms | GiB moved |", "|---|---|---|"]
    for title, (seconds, moved) in sorted(parts.items(), key=lambda item: -item[1][0]):
        if seconds:
            lines.append(f"| {title} | {seconds * 1e3:.2f} | {moved / 2**30:.2f} |")
    lines += ["", "| operator | shapes | calls | ms | GiB | GB/s |", "|---|---|---|---|---|---|"]
    for call, seconds in sorted(result.seconds.items(), key=lambda item: -item[1])[:rows]:
        moved = result.bytes.get(call, 0)
        lines.append(
            f"| {call[0]} | {call[1]} | {result.calls[call]} | {seconds * 1e3:.2f} | "
            f"{moved / 2**30:.2f} | {moved / seconds / 1e9:.0f} |"
        )
    total = sum(result.saved.values())
    lines += ["", f"Saved for the backward: {total / 2**30:.2f} GiB.", ""]
    lines += ["| module | GiB |", "|---|---|"]
    for module, size in sorted(result.saved.items(), key=lambda item: -item[1]):
        if size >= total / 500:
            lines.append(f"| {module} | {size / 2**30:.3f} |")
    return [*lines, ""]
