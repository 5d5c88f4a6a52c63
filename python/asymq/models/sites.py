"""The quantizers of a model, collected by name before anything changes, then put in all at once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asymq.config import QuantConfig
from asymq.layers import Quantized, QuantLayer, QuantOutput, registry
from asymq.layers.embedding import QuantEmbedding
from asymq.layers.experts import QuantExperts
from asymq.layers.layer import weight_of
from asymq.layers.quantized import need_own_forward, put_in
from asymq.quantizers import QuantAct, Quantizer, QuantSpec, WeightQuantizer, elements

# Names of layers side by side that are fed one tensor: queries, keys and values; gate and up.
_FED_ALIKE: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# Of an attention whose queries come from elsewhere than its keys and values.
_CROSS = re.compile("cross|encoder_attn|encdec", re.IGNORECASE)


@dataclass
class _Change:
    """What one module becomes."""

    name: str
    module: nn.Module
    base: type[Quantized]
    quantizers: dict[str, Quantizer | None]


class Plan:
    """What `prepare` will do to a model. A family calls the methods of the first part for a model
    that may lie below the root; names are relative to it."""

    def __init__(self, root: nn.Module, config: QuantConfig):
        self.root = self.model = root
        self.config = config
        self.prefix = ""
        self.left_float: list[str] = []  # what prepare warns of
        self._kinds: dict[str, str] = {}  # of all sites by name, skipped ones included
        self._aliases: dict[str, str] = {}  # of shared quantizers, to their names
        self._inputs: dict[str, QuantAct | None] = {}  # of inputs that several layers may be fed
        self._changes: dict[int, _Change] = {}  # by the module's identity
        self._heads = set(_heads(root))
        self._device = next((p.device for p in root.parameters()), None)

    def below(self, name: str) -> Plan:
        """The same plan, for a model within this one."""
        view = object.__new__(Plan)
        view.__dict__.update(self.__dict__)
        view.prefix = self._full(name) + "." if name else self.prefix
        view.model = self.model.get_submodule(name)
        return view

    # ---- what a model family says ----------------------------------------------------------------

    def refuse(self, condition: bool, what: str) -> None:
        if condition:
            raise ValueError(
                f"asymq.prepare: {type(self.model).__name__} with {what} is not supported"
            )

    def layer(self, name: str, base: type[QuantLayer] | None = None, output: bool = True) -> None:
        """Quantizes the weight and, unless `output` is False, the output of the layer `name`. base:
        what it becomes, by default what is registered for its class. An adapter (peft's) around a
        layer goes on: the layer's weight is quantized, and the adapter's output."""
        module = self.model.get_submodule(name)
        if isinstance(module, QuantLayer):
            return  # made with quantizers of its own, which stay
        if is_adapter(module):
            self.layer(f"{name}.base_layer", output=False)
            if output:
                self.output(name, _channels_of(module.get_submodule("base_layer")))
            return
        found = registry.find(type(module))
        if found is None or not issubclass(found, QuantLayer):
            raise ValueError(
                f"asymq.prepare: {self._full(name)} is a {type(module).__name__}, whose weight "
                f"asymq cannot read through a quantizer: it needs {registry.names()}"
            )
        base = base or found
        full = self._full(name)
        output = output and base.has_output
        # Its weight's spec is decided when all users of the weight are known.
        self._kinds[f"{full}.weight_quantizer"] = base.kind
        output_spec = self._spec(f"{full}.output_quantizer", "activation") if output else None
        quantizers = base.make_quantizers(module, None, output_spec, name=full, device=self._device)
        if base.multiplies and not self.has(module):
            quantizers["input_quantizer"] = self._input(full, module, base)
        self._add(full, module, base, quantizers)

    def _input(self, name: str, module: nn.Module, base: type[QuantLayer]) -> QuantAct | None:
        """The quantizer of what a layer multiplies its weight with, one for all that are fed it."""
        owner = self._first_fed(name)
        site = f"{owner}.input_quantizer"
        if site not in self._inputs:
            channels = base.input_channels(module)
            role = self._role(module, base)
            self._inputs[site] = self._activation(site, channels, "input", role)
            return self._inputs[site]
        quantizer = self._inputs[site]
        self._aliases[f"{name}.input_quantizer"] = site
        if quantizer is not None:
            quantizer.users += 1
        return quantizer

    def _first_fed(self, name: str) -> str:
        """The first of the layers beside the layer `name` that are fed the same tensor."""
        # Adapters hand what they are given to the layer within.
        parent, _, own = name.removesuffix(".base_layer").rpartition(".")
        beside = self.root.get_submodule(parent)
        for names in _FED_ALIKE:
            if own not in names:
                continue
            if len(names) == 3 and (
                _CROSS.search(parent.rpartition(".")[2]) or _CROSS.search(type(beside).__name__)
            ):
                names = names[:1] if own == names[0] else names[1:]
            modules = dict(beside.named_children())
            first = next(other for other in names if other in modules)
            within = ".base_layer" if is_adapter(modules[first]) else ""
            return f"{parent}.{first}{within}" if parent else f"{first}{within}"
        return name

    def _role(self, module: nn.Module, base: type[Quantized]) -> str | None:
        """What a layer is to a configuration (config.ROLES)."""
        if id(module) in self._heads:
            return "head"
        return "embedding" if issubclass(base, QuantEmbedding) else None

    def output(self, name: str, channels: int | None) -> None:
        """Quantizes the output of the module `name`, a tensor whose last axis has `channels`."""
        self.sites(name, QuantOutput, output_quantizer=channels)

    def sites(
        self, name: str, base: type[Quantized], **channels: int | None
    ) -> dict[str, Quantizer | None]:
        """Makes the module `name` a `base`, which uses the activation quantizers named in
        `channels`: the size of their last axis, None where only the tensors know it. Returns
        them."""
        module, full = self.model.get_submodule(name), self._full(name)
        label = full or type(module).__name__
        need_own_forward(module, label)
        known = getattr(base, "float_class", None)
        if known is not None and type(module) is not known and channels:
            sites = ", ".join(f"{full}.{site}" for site in channels)
            raise ValueError(
                f"asymq.prepare: {label} is a {type(module).__name__} with a forward of its own, "
                f"in which asymq cannot place {sites}; it knows that of {known.__name__}"
            )
        quantizers: dict[str, Quantizer | None] = {
            site: self._activation(f"{full}.{site}" if full else site, size, base.kinds.get(site))
            for site, size in channels.items()
        }
        self._add(full, module, base, quantizers)
        return quantizers

    def experts(self, name: str) -> None:
        """Quantizes the weights of the experts `name`, the tokens that they are given, and what
        their second weight is multiplied with."""
        module, full = self.model.get_submodule(name), self._full(name)
        quantizers = self.sites(name, QuantExperts, **QuantExperts.channels(module))
        for weight in QuantExperts.weights:
            site = f"{weight}_quantizer"
            spec = self._spec(f"{full}.{site}", "weight")
            if spec is not None:
                quantizers[site] = QuantExperts.make_weight_quantizer(
                    module, weight, spec, f"{full}.{site}"
                )

    def becomes(self, name: str, base: type[Quantized]) -> None:
        """Makes the module `name` a `base`, which has no quantizers of its own; a module of another
        class than the one whose forward `base` knows stays as it is."""
        module = self.model.get_submodule(name)
        known = getattr(base, "float_class", None)
        if (known is None or type(module) is known) and "forward" not in vars(module):
            self._add(self._full(name), module, base, {})

    def has(self, module: nn.Module) -> bool:
        return id(module) in self._changes

    def _full(self, name: str) -> str:
        return f"{self.prefix}{name}" if name else self.prefix.removesuffix(".")

    def _spec(self, name: str, kind: str, role: str | None = None) -> QuantSpec | None:
        self._kinds[name] = kind
        return self.config.spec_of(name, kind, role)

    def _activation(
        self, name: str, channels: int | None, kind: str | None, role: str | None = None
    ) -> QuantAct | None:
        if kind is None or (kind == "cache" and self.config.cache is None):
            kind = "activation"
        spec = self._spec(name, kind, role)
        if spec is None:
            return None
        return QuantAct.on_last_axis(spec, channels, name, self._device, kind)

    def _add(self, name: str, module: nn.Module, base, quantizers) -> None:
        if not self.has(module):  # one module may serve under several names
            self._changes[id(module)] = _Change(name, module, base, quantizers)

    # ---- what `prepare` does with it -------------------------------------------------------------

    @property
    def quantizers(self) -> Iterator[Quantizer]:
        for change in self._changes.values():
            yield from (q for q in change.quantizers.values() if q is not None)

    def give_weights_quantizers(self) -> None:
        """One for each weight, whoever uses it. ValueError: some user of a weight is not quantized,
        or its users want different ranges, or tensors overlap in part."""
        places = _Places(self.root)
        layers = [(c, c.base) for c in self._changes.values() if issubclass(c.base, QuantLayer)]
        quantized = {(id(change.module), "weight") for change, _ in layers}
        owners: dict[tuple, _Change] = {}
        for change, base in layers:
            name, weight = f"{change.name}.weight_quantizer", change.module._parameters["weight"]
            if weight is None:
                del self._kinds[name]
                continue
            owner = owners.setdefault(elements(weight), change)
            if owner is not change:
                self._need_one_role(owner, change, base)
                self._share(owner, change, base)
                self._aliases[name] = f"{owner.name}.weight_quantizer"
                del self._kinds[name]
                continue
            spec = self.config.spec_of(name, base.kind, self._role(change.module, base))
            if spec is not None:
                places.need_all_quantized(f"{change.name}.weight", weight, quantized)
                change.quantizers["weight_quantizer"] = base.make_weight_quantizer(
                    change.module, spec, f"{change.name}."
                )

        for change in self._changes.values():
            for own in QuantExperts.weights if issubclass(change.base, QuantExperts) else ():
                if change.quantizers.get(f"{own}_quantizer") is not None:
                    parameter = change.module.get_parameter(own)
                    name, user = f"{change.name}.{own}", (id(change.module), own)
                    places.need_all_quantized(name, parameter, {user})

    def _need_one_role(self, owner: _Change, change: _Change, base: type[QuantLayer]) -> None:
        """ValueError where the configuration wants two things of one weight."""
        if not base.kind == "weight" == self._kinds[f"{owner.name}.weight_quantizer"]:
            return
        roles = [self._role(c.module, c.base) for c in (owner, change)]
        specs = [self.config.of_role(role) for role in roles]
        if specs[0] != specs[1]:
            wishes = [
                f"{c.name}.weight ({role or 'weight'}: {spec})"
                for c, role, spec in zip((owner, change), roles, specs, strict=True)
            ]
            raise ValueError(
                f"asymq.prepare: {wishes[0]} and {wishes[1]} are one tensor, of which the "
                "configuration wants two things: make them equal, or untie the weights"
            )

    def _share(self, owner: _Change, change: _Change, base: type[QuantLayer]) -> None:
        """The quantizer of a weight's first user for another one."""
        quantizer = owner.quantizers["weight_quantizer"]
        if not isinstance(quantizer, WeightQuantizer):
            return  # None
        shape = quantizer.spec.granularity.of_weight(
            change.name, weight_of(change.module).shape, base.channel_axis, base.reduction_axis
        )
        if shape != quantizer.range_shape or base.kind != quantizer.kind:
            raise ValueError(
                f"asymq.prepare: {owner.name}.weight and {change.name}.weight are one tensor, of "
                f"which a {type(owner.module).__name__} and a {type(change.module).__name__} want "
                f"different ranges: untie them, or leave it out (skip {quantizer.name})"
            )
        quantizer.users += 1
        change.quantizers["weight_quantizer"] = quantizer

    def check(self, allow_lookahead: bool) -> None:
        what, model = "asymq.prepare", type(self.root).__name__
        unmatched = self.config.unmatched(self._kinds)
        for alias, name in self._aliases.items():
            if not set(unmatched) <= set(self.config.unmatched({alias: self._kinds[name]})):
                raise ValueError(
                    f"{what}: {alias} is {name}, since the {_thing(name)} is one tensor: name that"
                )
        if unmatched:
            more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
            raise ValueError(
                f"{what}: no quantizer of {model} is called {', '.join(unmatched[:3])}{more}; "
                f"they are called {', '.join(list(self._kinds)[:3])} and so on"
            )
        if not any(self.quantizers):
            raise ValueError(f"{what}: the configuration leaves {model} no quantizer")
        if self.config.cache is not None and "cache" not in self._kinds.values():
            raise ValueError(
                f"{what}: cache is given, but {model} has no attention whose keys and values asymq "
                "can quantize: cache must be None"
            )
        causal = any(getattr(m, "is_causal", False) for m in self.root.modules())
        for quantizer in self.quantizers:
            if not quantizer.live or not isinstance(quantizer, QuantAct):
                continue
            of_tokens = quantizer.spec.granularity.of_tokens
            if of_tokens and quantizer.name.endswith("scores_quantizer"):
                raise ValueError(
                    f"{what}: {quantizer.name} is PerToken: a row of scores spans the keys of "
                    "later tokens, which would decide its range (allow_lookahead does not help): "
                    "use PerTensor() there"
                )
            if causal and not of_tokens and not allow_lookahead:
                raise ValueError(
                    f"{what}: {quantizer.name} is dynamic: its range sees the whole tensor, so "
                    "every token sees later tokens; PerToken() gives each its own range, "
                    "allow_lookahead=True accepts it"
                )

    def apply(self) -> None:
        """A module that gets none of its quantizers stays what it is, but for one that has the
        inputs of its layers quantized ahead of them."""
        for change in self._changes.values():
            ahead = change.base.quantizes_ahead and self.config.input is not None
            if any(change.quantizers.values()) or not change.base.sites or ahead:
                put_in(change.module, change.base, change.quantizers)


def _heads(root: nn.Module) -> Iterator[int]:
    """Identities of what makes the logits of language models, of a model and within it."""
    for module in root.modules():
        get = getattr(module, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            yield id(head)


def _thing(quantizer: str) -> str:
    return "weight" if quantizer.endswith("weight_quantizer") else "input"


def is_adapter(module: nn.Module) -> bool:
    """Whether it is a layer of peft's around another, `base_layer`."""
    return hasattr(module, "get_base_layer") and isinstance(
        getattr(module, "base_layer", None), nn.Module
    )


def _channels_of(layer: nn.Module) -> int | None:
    base = registry.find(type(layer))
    return base.output_channels(layer) if base and issubclass(base, QuantLayer) else None


class _Places:
    """Where a model holds its parameters."""

    def __init__(self, root: nn.Module):
        self._by_storage: dict[int, list[tuple[str, nn.Module, Tensor]]] = defaultdict(list)
        for name, module in root.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    place = (f"{name}.{key}" if name else key, module, parameter)
                    self._by_storage[_storage(parameter)].append(place)

    def need_all_quantized(
        self, name: str, weight: Tensor, quantized: set[tuple[int, str]]
    ) -> None:
        """ValueError where a weight has a user that is not among the `quantized` ones (a module's
        id, the parameter's name), or shares a part of its memory with another parameter."""
        for other, module, parameter in self._by_storage[_storage(weight)]:
            if elements(parameter) == elements(weight):
                if (id(module), other.rpartition(".")[2]) not in quantized:
                    raise ValueError(
                        f"asymq.prepare: {name} is also {other} ({type(module).__name__}), which "
                        "asymq does not quantize, and asymq.convert would change it there: untie "
                        f"them, or leave it out (skip {name}_quantizer)"
                    )
            elif _overlap(parameter, weight):
                raise ValueError(
                    f"asymq.prepare: {name} and {other} overlap in memory without being one "
                    "tensor: give them memory of their own, or leave it out (skip "
                    f"{name}_quantizer)"
                )


def _storage(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether they have elements in common."""
    if a.is_meta or b.is_meta or not a.numel() or not b.numel():
        return False
    spans = [_span(tensor) for tensor in (a, b)]
    start, end = max(s[0] for s in spans), min(s[1] for s in spans)
    if start >= end:
        return False
    # Strides may pass each other, as those of two column blocks: mark bytes and look.
    marks = torch.zeros(max(s[1] for s in spans), dtype=torch.bool)
    _bytes_of(a, marks).fill_(True)
    return bool(_bytes_of(b, marks).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte (exclusive) within its storage."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(first), int(first + (reach + 1) * size)


def _bytes_of(tensor: Tensor, marks: Tensor) -> Tensor:
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return marks.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size)
