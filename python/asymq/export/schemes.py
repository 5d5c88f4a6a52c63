"""What compressed-tensors holds of a model: which weights as integers, and with which arguments.

Its words: a *scheme* says how the weight and the input of a layer are quantized, a *group* gives a
scheme to layers, its *targets*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asymq.conversion import Weight, weights_of_quantizers
from asymq.export.grids import Grid
from asymq.export.report import Row
from asymq.layers.experts import QuantExperts
from asymq.quantizers import Quantizer, WeightQuantizer, elements
from asymq.reference import apply_link

PACKED, INT8, INT8_ASYMMETRIC = "pack-quantized", "int-quantized", "naive-quantized"
MIXED = "mixed-precision"
ACTIVATIONS = ("refuse", "drop", "dynamic", "drop_factors")
_DIFFERENT = "what is served is not the model that was trained"


@dataclass
class Packed:
    """A weight that is stored as integers. weights, inputs: compressed-tensors' arguments of it and
    of what it is multiplied with (None: float)."""

    name: str
    parameter: nn.Parameter
    quantizer: WeightQuantizer
    of_experts: bool
    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def format(self) -> str:
        if self.weights["num_bits"] < 8:
            return PACKED
        return INT8 if self.weights["symmetric"] else INT8_ASYMMETRIC

    @property
    def packs_zero_point(self) -> bool:
        asymmetric = not self.weights["symmetric"]
        return asymmetric and self.format == PACKED and self.weights["strategy"] != "tensor"

    @property
    def scheme(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "weights": self.weights,
            "input_activations": self.inputs,
            "output_activations": None,
        }

    @property
    def target(self) -> str:
        return f"re:^{re.escape(self.module)}{'[.].*' if self.of_experts else ''}$"


class Plan:
    """What becomes of each quantizer of a model. In its errors, ValueErrors all, `what` is who
    exports.

    rows: of the report, by name. packed: the weights that are stored as integers; floats: the
    quantizers of those that are stored as the values of their codes, by elements.
    """

    def __init__(self, model: Any, quantizers: Mapping[str, Quantizer], what: str):
        self.model, self.quantizers, self.what = model, quantizers, what
        self.rows = {name: Row.of(name, quantizer) for name, quantizer in quantizers.items()}
        self.names = {quantizer: name for name, quantizer in quantizers.items()}
        self.packed: list[Packed] = []
        self.floats: dict[tuple, Quantizer] = {}
        self.warnings: list[str] = []

    def place_weights(self) -> None:
        head = self.model.get_output_embeddings()
        for quantizer, users in weights_of_quantizers(self.model, self.what).items():
            assert isinstance(quantizer, WeightQuantizer)
            self._need_codes(quantizer, users[0].parameter)
            module = self.model.get_submodule(users[0].name.rpartition(".")[0])
            linear = isinstance(module, nn.Linear)
            if isinstance(module, QuantExperts):
                self._add_experts(users[0], quantizer, module)
            elif linear and len(users) == 1 and module is not head:
                self._add(users[0], quantizer)
            elif linear or isinstance(module, nn.Embedding) or quantizer.kind == "norm_weight":
                why = ": a tied weight" if len(users) > 1 else ": the head" if linear else ""
                self._add_float(users[0], quantizer, why)
            else:
                self._refuse_layer(users[0].name, module)
        if not self.packed:
            raise ValueError(
                f"{self.what}: no weight of an nn.Linear, but for heads and tied ones, is "
                "quantized: save the model that asymq.convert returns with save_pretrained"
            )
        half = {weight.parameter.dtype for weight in self.packed} - {torch.float32, torch.float64}
        if half:
            name = str(half.pop()).removeprefix("torch.")
            self.warnings.append(
                f"scales are stored in float32, and what loads them may round them to {name}, the "
                "dtype of the model (transformers does without dequantize=True)"
            )

    def _need_codes(self, quantizer: WeightQuantizer, parameter: nn.Parameter) -> None:
        name = self.names[quantizer]
        if quantizer.live:
            raise ValueError(
                f"{self.what}: {name} has a dynamic range, which is no number that a file could "
                "hold: save the model that asymq.convert returns with save_pretrained"
            )
        if bool(parameter.isnan().any()):
            raise ValueError(
                f"{self.what}: the weight of {name} has NaNs, which have no codes: load a state "
                "from before it became so"
            )

    def _refuse_layer(self, name: str, module: nn.Module) -> None:
        cls = type(module).__name__
        count = sum(type(other) is type(module) for other in self.model.modules())
        raise ValueError(
            f"{self.what}: {name} is a {cls}'s ({count} in all), and compressed-tensors holds "
            "nn.Linear: use asymq.export_onnx, or leave them out when the model is prepared (skip)"
        )

    def _add_float(self, weight: Weight, quantizer: WeightQuantizer, why: str) -> None:
        self.floats[elements(weight.parameter)] = quantizer
        row = self.rows[self.names[quantizer]]
        row.container = str(weight.parameter.dtype).removeprefix("torch.")
        row.tensor, row.note = weight.name, f"dequantized{why}"

    def _add(self, weight: Weight, quantizer: WeightQuantizer) -> None:
        strategy, group = self._strategy(quantizer, quantizer.range_shape, weight.parameter.shape)
        arguments = self._arguments(quantizer, strategy, group)
        packed = Packed(*weight, quantizer, False, arguments)
        self.packed.append(packed)
        parts = in_files(self.model, {weight.name: weight.parameter.to("meta")})
        if len(parts) != 1:
            raise ValueError(
                f"{self.what}: transformers makes {weight.name} of {', '.join(parts)}, and does "
                f"not do so with integers: leave it out (skip {self.names[quantizer]})"
            )
        self._describe(packed, *parts)

    def _add_experts(
        self, weight: Weight, quantizer: WeightQuantizer, module: QuantExperts
    ) -> None:
        """transformers reads each expert's weight alone, packed and without zero points, and all in
        one way."""
        spec, shape, name = quantizer.spec, weight.parameter.shape, self.names[quantizer]
        parts = in_files(self.model, {weight.name: weight.parameter.to("meta")})
        needs = {
            "weights [experts, out, in]": not module.is_transposed,
            "files that list experts one by one": len(parts) >= shape[0],
            "symmetric weights": spec.symmetric,
            "2 to 7 bits": spec.bits < 8,
        }
        lacking = [need for need, holds in needs.items() if not holds]
        if lacking:
            raise ValueError(
                f"{self.what}: {name} is of {shape[0]} experts, which need {', '.join(lacking)} to "
                f"be loaded by transformers; this {type(self.model).__name__} has {spec.bits} bits"
                f"{'' if spec.symmetric else ', asymmetric'}: prepare it so, or leave them out "
                "(skip)"
            )
        strategy, group = self._strategy(quantizer, quantizer.range_shape[1:], shape[1:])
        # One range of what the files hold as two weights is one of each of their rows.
        strategy = "channel" if strategy == "tensor" else strategy
        packed = Packed(*weight, quantizer, True, self._arguments(quantizer, strategy, group))
        first = next((other for other in self.packed if other.of_experts), packed)
        if first.scheme != packed.scheme:
            raise ValueError(
                f"{self.what}: {self.names[first.quantizer]} and {name} differ, and transformers "
                "reads all experts in one way: give them one QuantSpec, or leave them out (skip)"
            )
        self.packed.append(packed)
        alike = dict.fromkeys(re.sub(r"\bexperts\.\d+", "experts.*", part) for part in parts)
        self._describe(packed, *alike)

    def _strategy(
        self, quantizer: WeightQuantizer, ranges: Sequence[int], shape: Sequence[int]
    ) -> tuple[str, int | None]:
        """Where the ranges lie on a weight [out, in], and the size of a group."""
        of_rows = len(ranges) == 2 and ranges[0] == shape[0]
        # A group as long as a row is a group still: layers of one spec are in one group.
        if of_rows and (ranges[1] > 1 or hasattr(quantizer.spec.granularity, "size")):
            return "group", shape[1] // ranges[1]
        if of_rows:
            return "channel", None
        if set(ranges) == {1}:
            return "tensor", None
        raise ValueError(
            f"{self.what}: {self.names[quantizer]} has ranges of shape {list(ranges)} on a weight "
            f"of {list(shape)}, and compressed-tensors knows channels along axis 0 and groups "
            "along axis 1: use asymq.export_onnx, or prepare it with PerChannel() or PerGroup(size)"
        )

    def _arguments(
        self, quantizer: WeightQuantizer, strategy: str, group: int | None
    ) -> dict[str, Any]:
        spec, name, grid = quantizer.spec, self.names[quantizer], Grid.of(quantizer)
        if spec.bits > 8:
            raise ValueError(
                f"{self.what}: {name} has {spec.bits} bits, and compressed-tensors holds 2 to 8: "
                "use asymq.export_onnx, or prepare it with fewer"
            )
        if bool(((grid.lowest > 0) | (grid.highest < 0)).any()):
            raise ValueError(
                f"{self.what}: {name}: 0 is none of its codes ({quantizer.describe_range()}), and "
                "compressed-tensors' zero point must be one: calibrate with force_zero=True, or "
                "use asymq.export_onnx"
            )
        return _arguments(spec.bits, spec.symmetric, strategy, group, dynamic=False)

    def _describe(self, packed: Packed, *parts: str) -> None:
        row, grid = self.rows[self.names[packed.quantizer]], Grid.of(packed.quantizer)
        row.container, row.scale = f"int{packed.weights['num_bits']}", grid.scale
        ending = "_packed" if packed.format == PACKED else ""
        row.tensor = ", ".join(f"{part}{ending}" for part in parts)
        if grid.offset is not None:
            row.zero_point = zero_point(grid).int()
        if packed.packs_zero_point:
            row.note = "transformers reads it with dequantize=True"

    # ---- activations -----------------------------------------------------------------------------

    def place_activations(self, activations: str) -> None:
        if activations not in ACTIVATIONS:
            raise ValueError(
                f"{self.what}: activations must be one of {', '.join(ACTIVATIONS)}, got "
                f"{activations!r}"
            )
        quantizers = [q for q in self.names if not isinstance(q, WeightQuantizer)]
        if not quantizers:
            return
        count, first = len(quantizers), self.names[quantizers[0]]
        if activations == "refuse":
            raise ValueError(
                f"{self.what}: {first} ({count} quantizers of activations in all) is not in a "
                "checkpoint of weights: activations='drop' leaves them out, 'dynamic' writes "
                "PerToken inputs, asymq.export_onnx writes static ranges"
            )
        if activations == "drop":
            for quantizer in quantizers:
                self.rows[self.names[quantizer]].note = "left out (activations='drop')"
            self.warnings.append(f"{count} quantizers of activations are left out: {_DIFFERENT}")
            return
        self._place_inputs(quantizers, drop=activations == "drop_factors")

    def _place_inputs(self, quantizers: list[Quantizer], drop: bool) -> None:
        layers = self._layers_of_inputs()
        stored = {weight.module: weight for weight in self.packed}
        strange = [
            q
            for q in quantizers
            if q not in layers or not q.spec.granularity.of_tokens or q.spec.bits > 8
        ]
        if strange:
            raise ValueError(
                f"{self.what}: {self.names[strange[0]]} ({len(strange)} in all) is no PerToken "
                "input of an nn.Linear with 2 to 8 bits, and compressed-tensors holds no others: "
                "activations='drop' leaves out all of them, asymq.export_onnx writes static ranges"
            )
        beside = [q for q in quantizers if not layers[q] <= stored.keys()]
        if beside and not drop:
            raise ValueError(
                f"{self.what}: {self.names[beside[0]]} ({len(beside)} in all) is the input of a "
                "layer that is stored in float, and compressed-tensors quantizes those of others "
                "alone: prepare the model without it (head=None, skip), or leave it out with "
                "activations='drop_factors'"
            )
        factors = {q: _factors(q) for q in quantizers}
        learned = [q for q in quantizers if bool((factors[q] != 1).any())]
        count = sum(int((factors[q] != 1).sum()) for q in learned)
        if learned and not drop:
            raise ValueError(
                f"{self.what}: {count} of {sum(f.numel() for f in factors.values())} factors (β, "
                f"γ) of inputs are not 1, those of {self.names[learned[0]]} first, and "
                "compressed-tensors holds none: train with QuantSpec(learn=False) as input, or "
                "leave them out with activations='drop_factors'"
            )
        for quantizer in quantizers:
            inputs = _input_arguments(quantizer)
            written = sorted(layers[quantizer] & stored.keys())
            for layer in written:
                stored[layer].inputs = inputs
            row, notes = self.rows[self.names[quantizer]], []
            if written:
                row.container = f"int{quantizer.spec.bits}"
                row.tensor = "input_activations"
                notes.append(_dynamic(quantizer))
            if quantizer in learned:
                low, high = (f"{end.item():.4g}" for end in torch.aminmax(factors[quantizer]))
                notes.append(f"factors from {low} to {high} left out")
            if quantizer in beside:
                notes.append("left out of layers in float")
            row.note = "; ".join(notes)
        if learned or beside:
            self.warnings.append(
                f"{count} learned factors, and {len(beside)} inputs of layers in float, are left "
                f"out: {_DIFFERENT}"
            )

    def _layers_of_inputs(self) -> dict[Quantizer, set[str]]:
        """Names of the nn.Linears whose input each quantizer quantizes, of those that quantize
        nothing else."""
        layers: dict[Quantizer, set[str]] = {}
        others = set()
        for name, quantizer in self.model.named_modules(remove_duplicate=False):
            if isinstance(quantizer, Quantizer):
                layer, _, own = name.rpartition(".")
                layers.setdefault(quantizer, set()).add(layer)
                if own != "input_quantizer" or not isinstance(
                    self.model.get_submodule(layer), nn.Linear
                ):
                    others.add(quantizer)
        return {quantizer: names for quantizer, names in layers.items() if quantizer not in others}

    # ---- the configuration -----------------------------------------------------------------------

    def quantization(self) -> dict[str, Any]:
        """What config.json says of it."""
        groups: list[dict[str, Any]] = []
        # transformers takes the first group that names experts for theirs.
        for weight in sorted(self.packed, key=lambda weight: not weight.of_experts):
            same = next((g for g in groups if weight.scheme.items() <= g.items()), None)
            if same is None:
                same = {"targets": [], **weight.scheme}
                groups.append(same)
            same["targets"] = list(dict.fromkeys([*same["targets"], weight.target]))
        inputs = [weight for weight in self.packed if weight.inputs is not None]
        strange = [weight for weight in self.packed if weight.packs_zero_point]
        if strange and (len(groups) > 1 or inputs):
            raise ValueError(
                f"{self.what}: {self.names[strange[0].quantizer]} has zero points for each channel "
                "or group, which transformers reads in a model of one kind of weights alone, and "
                "without inputs: prepare it symmetric, PerTensor() or with 8 bits"
            )
        if len(groups) == 1:
            groups[0]["targets"] = ["Linear"]
        formats = {group["format"] for group in groups}
        return {
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "ignore": self._ignored(),
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        }

    def _ignored(self) -> list[str]:
        """Layers that are stored in float, routers of experts among them."""
        integers = {weight.module for weight in self.packed}
        return [
            name
            for name, module in self.model.named_modules()
            if name not in integers
            and not isinstance(module, nn.Embedding)
            and (weight := module._parameters.get("weight")) is not None
            and weight.dim() == 2
        ]


def _arguments(
    bits: int, symmetric: bool, strategy: str, group: int | None, dynamic: bool
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
    }


def _input_arguments(quantizer: Quantizer) -> dict[str, Any]:
    spec = quantizer.spec
    group = spec.granularity.options()["group"]
    strategy = "token" if group is None else "group"
    return _arguments(spec.bits, spec.symmetric, strategy, group, dynamic=True)


def _dynamic(quantizer: Quantizer) -> str:
    """Of a token's symmetric scale, its largest element divided by the codes on either side."""
    spec = quantizer.spec
    if not spec.symmetric:
        return "dynamic"
    own = -spec.codes[0]
    return (
        f"dynamic; transformers divides by {spec.steps / 2}, not {own}: codes differ by 1 at most"
    )


def _factors(quantizer: Quantizer) -> Tensor:
    factors = torch.cat([getattr(quantizer, name).detach() for name in quantizer.learned])
    return apply_link(quantizer.spec.link, factors)


def zero_point(grid: Grid) -> Tensor:
    """What is added to the codes of an asymmetric grid, so that they are signed integers."""
    return -grid.lowest - 2 ** (grid.spec.bits - 1)


def in_files(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under the names, and in the parts, that files of its family have."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))
