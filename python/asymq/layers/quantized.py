"""The one way in and out: a module becomes quantized, in place, by getting a class that is a
subclass of its own, and float again by getting its class back.

The object, its hooks, ties, parameter names, isinstance answers and its own forward stay. Its
quantizers are its submodules, and its forward applies all of them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor, nn

from asymq.quantizers import Quantizer, apply


class Quantized(nn.Module):
    """A module with quantizers. Subclasses say which, and what a forward does with them.

    sites: the attributes that hold its quantizers, None where a site has none. kinds: those of
    activation quantizers that are not of kind "activation". token_axes: of activations whose tokens
    are not axis 1, the axis of these, and where each of them sees others, of those.
    float_class: the class it had, which `to_float` gives back.
    """

    sites: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[Mapping[str, str]] = {}
    token_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    float_class: ClassVar[type[nn.Module]]
    public: ClassVar[bool] = False
    # Whether its forward may quantize what its layers are given, in one with what comes before.
    quantizes_ahead: ClassVar[bool] = False
    # Of a class made at run time: what was put into its module, in that order.
    _bases: ClassVar[tuple[type[Quantized], ...]] = ()

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        """What the subclass of this and `float_class` gets where `float_class` is not the one whose
        forward this class knows: its own forward goes on, between the quantizers."""
        return {}

    def quantized_parameters(self) -> Iterator[tuple[str, Quantizer]]:
        """Names of the parameters that it reads through a quantizer, ``<name>_quantizer``."""
        for site in self.sites:
            name, quantizer = site.removesuffix("_quantizer"), getattr(self, site)
            if quantizer is not None and self._parameters.get(name) is not None:
                yield name, quantizer

    def to_float(self) -> nn.Module:
        """The float module that this one was made of, a new one with this one's parameters."""
        module = twin(self)
        module.take_out()
        return module

    def begin(self) -> None:
        """What becoming this does beside the quantizers."""

    def end(self) -> None:
        """Undoes `begin`."""

    def take_out(self) -> None:
        """Undoes `put_in`, in place."""
        cls = type(self)
        base = cls._bases[-1] if "_bases" in vars(cls) else cls
        base.end(self)
        for name in base.sites:
            delattr(self, name)
        self.__class__ = cls.float_class  # type: ignore[assignment]

    def __reduce_ex__(self, protocol):
        """A class made at run time is made again where it is opened."""
        cls = type(self)
        if "_bases" not in vars(cls):
            return super().__reduce_ex__(protocol)
        return _rebuild, (_original(cls), cls._bases), self.__dict__.copy()


def quantized_parameters(model: nn.Module) -> Iterator[tuple[str, Quantizer, nn.Parameter]]:
    """(name, quantizer, parameter) of every parameter that a module reads through a quantizer, one
    that several read once for each."""
    for name, module in model.named_modules():
        for own, quantizer in (
            module.quantized_parameters() if isinstance(module, Quantized) else ()
        ):
            parameter = module._parameters[own]
            assert parameter is not None
            yield f"{name}.{own}" if name else own, quantizer, parameter


def put_in(
    module: nn.Module, base: type[Quantized], quantizers: Mapping[str, Quantizer | None]
) -> None:
    """Makes `module`, in place, a `base` with these quantizers."""
    module.__class__ = quantized_class(type(module), base)  # type: ignore[arg-type]
    assert isinstance(module, base)
    for name in base.sites:
        setattr(module, name, quantizers.get(name))
    base.begin(module)


# To mypy a class is not hashable: calls need an ignore.
@functools.cache
def quantized_class(cls: type[nn.Module], base: type[Quantized]) -> type[Quantized]:
    """The subclass of `cls` and `base`. It bears the name of `cls`, by which transformers,
    accelerate and others know classes; layers that are public bear their own."""
    known = getattr(base, "float_class", None) is cls
    if known and base.public:
        return base
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "float_class": cls,
        "sites": base.sites,
        "_bases": (*(cls._bases if issubclass(cls, Quantized) else ()), base),
    }
    members |= {} if known else base.own_members(cls)
    return type(cls.__name__, (base,) if known else (base, cls), members)


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    while issubclass(cls, Quantized) and "_bases" in vars(cls):
        cls = cls.float_class
    return cls


def _rebuild(cls: type[nn.Module], bases: tuple[type[Quantized], ...]) -> nn.Module:
    for base in bases:
        cls = quantized_class(cls, base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def twin(module: nn.Module):
    """Another module with all that this one has: the same parameters, submodules, hooks."""
    result = type(module).__new__(type(module))
    for key, value in vars(module).items():
        result.__dict__[key] = value.copy() if isinstance(value, dict) else value
    return result


def need_own_forward(module: nn.Module, label: str) -> None:
    """ValueError where someone has replaced the forward of this one module."""
    if "forward" in vars(module):
        raise ValueError(
            f"{label}: the forward of this {type(module).__name__} has been replaced (as "
            "accelerate's device maps do); quantize the layer before that"
        )


# ---- a forward that is not ours ------------------------------------------------------------------
#
# While a module's own forward runs, it reads its parameters through their quantizers. Elsewhere,
# and in other threads, the same attributes are the parameters themselves: ties, resizing,
# functional_call, replicas and one thread that trains while another evaluates see no difference.

_thread = threading.local()


@contextmanager
def reading_quantized(module: nn.Module) -> Iterator[None]:
    outer = getattr(_thread, "reading", None)
    # Each parameter is quantized once, however often the forward reads it.
    _thread.reading = module, {}
    try:
        yield
    finally:
        _thread.reading = outer


def quantized_parameter(name: str) -> property:
    """The parameter `name`, through ``<name>_quantizer`` within its module's own forward."""

    def read(self):
        # A replica (DataParallel's) holds plain tensors.
        parameter = self._parameters[name] if name in self._parameters else self.__dict__[name]
        reading = getattr(_thread, "reading", None)
        if reading is None or reading[0] is not self or parameter is None:
            return parameter
        results = reading[1]
        if name not in results:
            results[name] = apply(getattr(self, f"{name}_quantizer"), parameter)
        return results[name]

    def write(self, value):
        if name in self._parameters:
            self._parameters[name] = value
        else:
            self.__dict__[name] = value

    return property(read, write)


def own_forward(cls: type[nn.Module], *parameters: str) -> dict[str, Any]:
    """The forward of `cls`, which reads these parameters through their quantizers, between the
    quantizers of its first argument and of what it returns."""
    _, first, *_ = signature(cls.forward).parameters

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        if self.input_quantizer is not None:
            if args:
                args = (self.input_quantizer(args[0]), *args[1:])
            else:
                kwargs[first] = self.input_quantizer(kwargs[first])
        with reading_quantized(self):
            y = cls.forward(self, *args, **kwargs)
        return self.quantize_output(y)

    return {"forward": forward} | {name: quantized_parameter(name) for name in parameters}


class QuantOutput(Quantized):
    """Any module with a quantizer of its output, a tensor."""

    sites = ("output_quantizer",)

    @classmethod
    def own_members(cls, float_class: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(float_class.forward)
        def forward(self, *args, **kwargs) -> Tensor:
            return apply(self.output_quantizer, float_class.forward(self, *args, **kwargs))

        members: dict[str, Any] = {"forward": forward}
        if hasattr(float_class, "get_base_layer"):
            members["unload_and_optionally_merge_module"] = _unload_adapter
        return members


def _unload_adapter(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
    """What peft puts in the place of an adapter that is taken off: the layer in it, which gets the
    quantizer of their output. (That of an embedding is on its weight's grid then.)"""
    if merge:
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    layer, quantizer = self.get_base_layer(), self.output_quantizer
    if not isinstance(layer, Quantized):
        put_in(layer, QuantOutput, {"output_quantizer": quantizer})
    elif getattr(layer, "has_output", "output_quantizer" in layer.sites):
        layer.output_quantizer = quantizer
    return layer
