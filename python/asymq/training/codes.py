"""The integer codes of a model's quantized weights, and how many of them change."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from asymq import ops
from asymq.layers import quantized_parameters
from asymq.quantizers import Quantizer, is_split

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A weight and what it is read through. Of one that FSDP2 has split among processes, all that
    is said of elements is said of this process's."""

    name: str
    quantizer: Quantizer
    parameter: nn.Parameter

    @property
    def values(self) -> Tensor:
        parameter = self.parameter.detach()
        return parameter.to_local() if is_split(parameter) else parameter

    @property
    def options(self) -> dict:
        spec = self.quantizer.spec
        return {"bits": spec.bits, "eps": spec.eps, "full_range": spec.full_range}

    def scale_offset(self) -> tuple[Tensor, Tensor | None]:
        """Present scale and offset (None if symmetric), as operators take them with `values`."""
        scale, offset = self.quantizer.scale_offset(self.parameter.detach())
        if is_split(self.parameter) and scale.numel() > 1:
            scale, offset = self._part(scale), None if offset is None else self._part(offset)
        return scale, offset

    def codes(self) -> Tensor:
        return ops.quantize(self.values, *self.scale_offset(), **self.options)

    @functools.cached_property
    def process_groups(self) -> tuple[ProcessGroup, ...]:
        """Over which counts of elements are summed, one after the other, to be those of the whole
        weight."""
        if not is_split(self.parameter):
            return ()
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        return tuple(mesh.get_group(i) for i, p in enumerate(placements) if p.is_shard())

    def need_plain_shard(self) -> None:
        """ValueError where this process's elements cannot have their ranges found."""
        if not is_split(self.parameter):
            return
        if any(is_split(p) for p in self.quantizer.parameters(recurse=False)):
            raise ValueError(
                f"the ranges of {self.quantizer.label} are split among processes: shard the model "
                "with asymq.shard, which leaves them whole"
            )
        if self.quantizer.live:
            raise ValueError(
                f"{self.quantizer.label} takes its range from a weight that is split among "
                "processes; give it a static range"
            )
        strange = [p for p in self.parameter.placements if not (p.is_shard() or p.is_replicate())]
        if strange:
            raise ValueError(
                f"{self.name} is placed as {strange[0]}; weights may be whole, or split by "
                "asymq.shard"
            )

    def _part(self, ranges: Tensor) -> Tensor:
        """Those of `ranges` that this process's elements have."""
        for axis, (first, count) in enumerate(self._elements):
            whole = self.parameter.shape[axis]
            if ranges.shape[axis] == 1 or count == whole:
                continue
            block = whole // ranges.shape[axis]
            if first % block or count % block:
                ranges, block = ranges.repeat_interleave(block, axis), 1
            ranges = ranges.narrow(axis, first // block, count // block)
        return ranges

    @functools.cached_property
    def _elements(self) -> list[tuple[int, int]]:
        """Of every axis the first of this process's elements, and how many it has."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        parameter: Tensor = self.parameter
        assert is_split(parameter)
        shape, first = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        return list(zip(first, shape, strict=True))


def coded_weights(model: nn.Module) -> Iterator[CodedWeight]:
    """Every weight that has a weight quantizer, one that several modules read once."""
    seen = set()
    for name, quantizer, parameter in quantized_parameters(model):
        if quantizer.kind == "weight" and id(parameter) not in seen:
            seen.add(id(parameter))
            yield CodedWeight(name, quantizer, parameter)


class Counter:
    """Counts the codes of some weights that change from one call to the next."""

    def __init__(self, weights: list[CodedWeight]):
        self._weights = weights
        self._codes: list[Tensor] = []
        self._ranges: list[_KnownRange] = [_KnownRange(weight) for weight in weights]
        # Weights that share their processes are summed in one message.
        self._parts: dict[tuple, list[int]] = {}
        for i, weight in enumerate(weights):
            self._parts.setdefault(weight.process_groups, []).append(i)
        order = [i for part in self._parts.values() for i in part]
        places = sorted(range(len(order)), key=order.__getitem__)
        self._places = torch.tensor(places, device=weights[0].values.device)

    @torch.no_grad()
    def start(self) -> None:
        """Counts from the present codes on. The tensors stay: a CUDA graph may know them."""
        if self._codes:
            self._update()
        else:
            self._codes = [weight.codes() for weight in self._weights]

    @torch.no_grad()
    def count(self) -> Tensor:
        """How many codes of each weight have changed since the last call, int64, on the device of
        the first weight; of split weights, on all processes."""
        changed = self._update()
        device = changed[0].device
        parts = []
        for groups, part in self._parts.items():
            counts = torch.stack([changed[i].to(device, non_blocking=True) for i in part])
            for group in groups:
                torch.distributed.all_reduce(counts, group=group)
            parts.append(counts)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[self._places]

    def _update(self) -> list[Tensor]:
        """Makes the codes the present ones. How many changed of each weight, int64 and 0-d."""
        in_graph = _in_graph()
        return [
            ops.update_codes_(codes, weight.values, *known.scale_offset(in_graph), **known.options)
            for weight, codes, known in zip(self._weights, self._codes, self._ranges, strict=True)
        ]


class _KnownRange:
    """Scale and offset of a weight, found again only when its range has changed: a step has many
    weights, and the host little time."""

    def __init__(self, weight: CodedWeight):
        self._weight, self.options = weight, weight.options
        self._parameters = tuple(weight.quantizer.parameters(recurse=False))
        self._of: list[tuple[int, int]] = []
        self._known: tuple[Tensor, Tensor | None] | None = None

    def scale_offset(self, in_graph: bool) -> tuple[Tensor, Tensor | None]:
        # What is not part of a graph, its replays would never see change.
        if self._weight.quantizer.live or in_graph:
            return self._weight.scale_offset()
        of = [(p.data_ptr(), p._version) for p in self._parameters]
        if self._known is None or of != self._of:
            self._known, self._of = self._weight.scale_offset(), of
        return self._known


def _in_graph() -> bool:
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )
