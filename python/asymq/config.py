"""Which quantizers a model gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

from asymq.quantizers import Granularity, PerChannel, PerGroup, PerToken, QuantSpec
from asymq.quantizers.spec import Json

KINDS = ("weight", "activation", "norm_weight", "input", "cache")
# Weights with a spec of their own: the embedding tables, and what makes logits of hidden states.
ROLES = ("embedding", "head")
AS_WEIGHT: Final = "weight"
# Of the scaling law: bits of weights (0: float), of inputs, and of the input of down_proj.
PRECISIONS: Final = {
    "W4A4": (4, 4, 4),
    "W4A16": (4, 0, 0),
    "W16A4": (0, 4, 4),
    "W4A4-FC2A8": (4, 4, 8),
    "W16A4-FC2A8": (0, 4, 8),
}
LAST_INPUT: Final = "*down_proj.input_quantizer"
LEARNED_CLIP = 256  # elements a range, from which on the scaling law's inputs learn one


def _matches(pattern: str, name: str, kind: str) -> bool:
    """Whether a wildcard name, with or without "kind:" before it, selects a quantizer."""
    wanted, colon, rest = pattern.partition(":")
    if colon and wanted in KINDS:
        return kind == wanted and fnmatchcase(name, rest)
    return fnmatchcase(name, pattern)


def _need_kind(pattern: str) -> None:
    """ValueError where a wildcard name starts with "kind:" of a kind that there is not: names have
    no colons."""
    kind, colon, _ = pattern.partition(":")
    if colon and kind not in KINDS:
        raise ValueError(
            f"QuantConfig: {pattern!r} matches nothing: before the colon must be one of "
            f"{', '.join(KINDS)}"
        )


@dataclass(frozen=True)
class QuantConfig(Json):
    """The quantizers of a model, each a QuantSpec, or None: no quantizer.

    weight: of Linear, Conv1D, Embedding and other layers' weights. activation: of the output of
    every operation. norm_weight: of weights of normalization layers. input: of what a layer
    multiplies its weight with (in place of ``activation``, which would quantize it twice). cache:
    of attention's keys and values as it gets them; None: they are activations. embedding, head: of
    the weights of embedding tables and of the language model's head, "weight" as other weights (a
    head that is None has no input quantizer either; tied ones must be equal).

    overrides: wildcard names of quantizers (as `summary` prints them) to what those get instead,
    the last match deciding; ``"weight:*h.0.*"`` selects among the quantizers of one kind. skip:
    wildcard names, likewise, of quantizers left out.

    The class methods are recipes: the paper's setting, and what is deployed.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    norm_weight: QuantSpec | None = None
    overrides: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    skip: Sequence[str] = ()
    _: KW_ONLY
    input: QuantSpec | None = None
    cache: QuantSpec | None = None
    embedding: QuantSpec | Literal["weight"] | None = AS_WEIGHT
    head: QuantSpec | Literal["weight"] | None = AS_WEIGHT

    def __post_init__(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise ValueError(
                "QuantConfig: overrides must map wildcard names to QuantSpecs, got "
                f"{self.overrides!r}"
            )
        object.__setattr__(self, "overrides", dict(self.overrides))
        object.__setattr__(
            self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        )
        for pattern in (*self.overrides, *self.skip):
            _need_kind(pattern)
        specs = {name: getattr(self, name) for name in (*KINDS, *ROLES)}
        specs |= {f"overrides[{name!r}]": spec for name, spec in self.overrides.items()}
        for name, spec in specs.items():
            if name in ROLES and isinstance(spec, str) and spec == AS_WEIGHT:
                continue
            if spec is not None and not isinstance(spec, QuantSpec):
                allowed = (
                    'a QuantSpec, None or "weight"' if name in ROLES else "a QuantSpec or None"
                )
                raise ValueError(f"QuantConfig: {name} must be {allowed}, got {spec!r}")
            of_weight = name in ("weight", "norm_weight", *ROLES) or name.startswith(
                ("overrides['weight:", "overrides['norm_weight:")
            )
            if spec is not None and of_weight and spec.granularity.of_tokens:
                raise ValueError(
                    f"QuantConfig: {name}: a weight has no tokens: use PerChannel() or "
                    f"PerGroup(size) in place of {spec.granularity!r}"
                )
        if self.activation is not None and self.input is not None:
            raise ValueError(
                "QuantConfig: activation and input exclude each other: the output of one layer is "
                "the input of the next, and would be quantized twice"
            )

    @classmethod
    def table2(
        cls, parameterization: str, *, weight_bits: int = 4, activation_bits: int = 12
    ) -> QuantConfig:
        """The paper's setting for language models (its Table 2): weights 4 bits, symmetric, per
        output channel; activations and LayerNorm weights 12 bits, asymmetric, per tensor."""
        activation = QuantSpec(activation_bits).with_parameterization(parameterization)
        weight = QuantSpec(weight_bits, symmetric=True, granularity=PerChannel())
        return cls(weight.with_parameterization(parameterization), activation, activation)

    @classmethod
    def w4a16(cls, group: int = 128) -> QuantConfig:
        """Weights alone, 4 bits, symmetric, in groups, embedding and head in float: what vLLM and
        the kernels of GPTQ and AWQ run."""
        return cls(_weight(4, PerGroup(group)), embedding=None, head=None)

    @classmethod
    def w4a8(cls, group: int = 32, cache: int | None = None) -> QuantConfig:
        """4-bit weights in groups, 8-bit inputs with a range of each token (asymmetric), embedding
        and head 8 bits per row: what ExecuTorch and torchao's 8da4w run, Meta's Llama 3.2 among
        them. cache: bits of attention's keys and values, likewise per token; None: float."""
        return cls(
            _weight(4, PerGroup(group)),
            input=_per_token(8),
            cache=None if cache is None else _per_token(cache),
            embedding=_weight(8, PerChannel()),
            head=_weight(8, PerChannel()),
        )

    @classmethod
    def w8a8(cls, cache: int | None = None) -> QuantConfig:
        """8-bit weights per row and inputs per token, both symmetric, embedding and head in float:
        what vLLM and llm-compressor run. cache: bits of keys and values, likewise."""
        return cls(
            _weight(8, PerChannel()),
            input=_per_token(8, symmetric=True),
            cache=None if cache is None else _per_token(cache, symmetric=True),
            embedding=None,
            head=None,
        )

    @classmethod
    def w4a4(cls, group: int | None = None, cache: int | None = None) -> QuantConfig:
        """4-bit weights, symmetric with all 16 codes, and 4-bit inputs per token (asymmetric), both
        in groups where `group` is given, else weights per row; embedding and head in float: the
        setting of research (SpinQuant, the scaling law of QAT). cache: bits of keys and values,
        asymmetric, per token."""
        granularity = PerChannel() if group is None else PerGroup(group)
        return cls(
            _weight(4, granularity).replace(full_range=True),
            input=_per_token(4, group=group),
            cache=None if cache is None else _per_token(cache),
            embedding=None,
            head=None,
        )

    @classmethod
    def npu(
        cls, weight: int = 4, activation: int = 16, cache: int = 8, head: int = 8
    ) -> QuantConfig:
        """Static integers as QNN runs them: weights symmetric per row, the output of every
        operation and norm weights asymmetric per tensor, keys and values of `cache` bits, embedding
        and head of `head` bits."""
        of_activation = QuantSpec(activation)
        of_head = _weight(head, PerChannel())
        return cls(
            _weight(weight, PerChannel()),
            of_activation,
            of_activation,
            cache=QuantSpec(cache),
            embedding=of_head,
            head=of_head,
        )

    @classmethod
    def scaling_law(cls, precision: str, group: int | Literal["token"]) -> QuantConfig:
        """What "Scaling Law for Quantization-Aware Training" (arXiv 2505.14302) quantizes: weights
        and inputs of all linear layers but the head, with live ranges, symmetric with all codes, so
        that nothing needs calibration.

        precision: such as "W4A4" or "W16A4-FC2A8" (weights in float, inputs 4 bits, that of
        down_proj 8), a key of `asymq.scaling_law.PAPER_LAWS`. group: how many elements of a row, or
        of a token, share a range, "token" for whole rows. A range ends at the largest element; the
        inputs' from 256 elements on at that times a learned factor, which starts at 1.
        """
        if precision not in PRECISIONS:
            raise ValueError(
                f"QuantConfig.scaling_law: precision must be one of {', '.join(PRECISIONS)}, got "
                f"{precision!r}"
            )
        size = None if group == "token" else group
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 2):
            raise ValueError(
                'QuantConfig.scaling_law: group must be an integer of at least 2, or "token", got '
                f"{group!r}"
            )
        weights, inputs, last = PRECISIONS[precision]
        absmax = QuantSpec(4, symmetric=True, full_range=True, dynamic=True, learn=False)
        clipped = size is None or size >= LEARNED_CLIP
        weight = absmax.replace(granularity=PerChannel() if size is None else PerGroup(size))
        of_input = absmax.replace(granularity=PerToken(size), learn=clipped)
        return cls(
            weight if weights else None,
            input=of_input if inputs else None,
            embedding=None,
            head=None,
            overrides={LAST_INPUT: of_input.replace(bits=last)} if last != inputs else {},
        )

    def replace(self, **changes) -> QuantConfig:
        """This configuration with other fields, such as ``config.replace(norm_weight=None)``."""
        return dataclasses.replace(self, **self._known(changes))

    def of_role(self, role: str | None) -> QuantSpec | None:
        """What a weight gets that no override names: role is "embedding", "head" or None."""
        spec = AS_WEIGHT if role is None else getattr(self, role)
        return self.weight if isinstance(spec, str) else spec

    def spec_of(self, name: str, kind: str, role: str | None = None) -> QuantSpec | None:
        """What the quantizer `name` of `kind` gets (one of KINDS), that of a layer also by the
        layer's role (one of ROLES, or None)."""
        if any(_matches(pattern, name, kind) for pattern in self.skip):
            return None
        spec = self.of_role(role) if kind == "weight" else getattr(self, kind)
        if kind == "input" and role == "head" and self.head is None:
            spec = None
        for pattern, override in self.overrides.items():
            if _matches(pattern, name, kind):
                spec = override
        return spec

    def unmatched(self, kinds: Mapping[str, str]) -> list[str]:
        """The wildcard names of overrides and skip that match none of the quantizers, whose kinds
        are given by name."""
        return [
            pattern
            for pattern in (*self.overrides, *self.skip)
            if not any(_matches(pattern, name, kind) for name, kind in kinds.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        def of(spec):
            return spec.to_dict() if isinstance(spec, QuantSpec) else spec

        return {
            **{name: of(getattr(self, name)) for name in (*KINDS, *ROLES)},
            "overrides": {name: of(spec) for name, spec in self.overrides.items()},
            "skip": list(self.skip),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        def of(spec):
            return QuantSpec.from_dict(spec) if isinstance(spec, Mapping) else spec

        arguments = cls._known(values)
        overrides = {name: of(spec) for name, spec in arguments.pop("overrides", {}).items()}
        skip = arguments.pop("skip", ())
        specs = {name: of(spec) for name, spec in arguments.items()}
        for kind in ("weight", "activation", "norm_weight"):
            if kind not in specs:
                raise ValueError(f"QuantConfig: {kind} is missing (null: no such quantizers)")
        return cls(**specs, overrides=overrides, skip=skip)


def _weight(bits: int, granularity: Granularity) -> QuantSpec:
    return QuantSpec(bits, symmetric=True, granularity=granularity)


def _per_token(bits: int, symmetric: bool = False, group: int | None = None) -> QuantSpec:
    return QuantSpec(bits, symmetric=symmetric, granularity=PerToken(group))
