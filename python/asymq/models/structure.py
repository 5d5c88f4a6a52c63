"""What models of transformers have beside their layers, whatever their family: attention, decoders'
layers and MLPs, activation functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel

from asymq.layers import QuantEmbedding, QuantLinear, QuantLogits, QuantRMSNorm, registry
from asymq.layers.activation import is_activation
from asymq.layers.attention import is_attention
from asymq.layers.experts import is_experts
from asymq.layers.layer import QuantNorm
from asymq.models.block import channels_of, plan_attention
from asymq.models.decoder import QuantDecoderLayer, QuantGatedMLP, gated_mlp_of, layer_of
from asymq.models.root import QuantAttentionModel, QuantCausalLM
from asymq.models.sites import Plan
from asymq.models.steps import chained, read

# What decides beside experts who gets which token: it stays float.
_ROUTERS = ("gate", "router", "shared_expert_gate")
# What makes the values of an attention, whose quantizer stands for that of their output.
_VALUES = ("v_proj", "value", "v_lin", "v")


class Structure:
    """Plans what it is shown of a model, from the root down."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._models: dict[str, PreTrainedModel] = {}  # without those within them
        self._heads: set[nn.Module] = set()
        self._attentions: dict[str, nn.Module] = {}
        self._layers: dict[str, nn.Module] = {}
        self._experts: dict[str, nn.Module] = {}
        self._routers: set[str] = set()

    def stays_float(self, name: str) -> bool:
        """Whether a module belongs to a mixture's router."""
        return _within(name, self._routers)

    def layer(self, name: str) -> None:
        """A layer that is registered."""
        module = self._plan.model.get_submodule(name)
        parent, _, own = name.rpartition(".")
        if module in self._heads and registry.find(type(module)) is QuantLinear:
            self._plan.layer(name, QuantLogits)
        else:
            self._plan.layer(name, output=not (own in _VALUES and parent in self._attentions))

    def module(self, name: str, module: nn.Module) -> None:
        """Any other module, after those that it is part of."""
        plan, cls = self._plan, type(module)
        if isinstance(module, PreTrainedModel) and not _within(name, self._models):
            self._models[name] = module
            if module.loss_type == "ForCausalLM":
                self._heads.add(module.get_output_embeddings())
        if not _within(name, self._models) or plan.has(module):
            return
        if _within(name, self._experts) or _within(name, self._routers):
            return
        children = dict(module.named_children())
        if any(type(child).__name__.endswith("Experts") for child in children.values()):
            self._routers |= {f"{name}.{router}" for router in _ROUTERS if router in children}
        if is_attention(module):
            self._attentions[name] = module
            plan_attention(plan, name, module)
        elif is_experts(module):
            self._experts[name] = module
            plan.experts(name)
        elif is_activation(module) or _is_bare_norm(module):
            plan.output(name, None)
        elif (names := gated_mlp_of(cls)) and _are_modules(module, filter(None, names)):
            width = channels_of(getattr(module, names.down), "input")
            plan.sites(name, QuantGatedMLP, product_quantizer=width)
            plan.output(f"{name}.{names.act}", width)
        elif (layer := layer_of(cls)) and _are_modules(module, layer.modules):
            attention = module.get_submodule(layer.attention)
            if is_attention(attention):
                self._layers[name] = module
                width = getattr(attention.config, "hidden_size", None)
                sums = dict.fromkeys(QuantDecoderLayer.sites, width)
                plan.sites(name, QuantDecoderLayer, **sums)

    def end(self) -> None:
        """Models come last: what they do depends on their attention's quantizers."""
        for name, model in self._models.items():
            causal = model.loss_type == "ForCausalLM"
            self._plan.becomes(name, QuantCausalLM if causal else QuantAttentionModel)

    def unknown(self) -> list[str] | None:
        """Classes of transformers within which more happens than is quantized, with the steps of
        their forwards; None: all that happens is."""
        if not self._models:
            return None
        classes = dict.fromkeys(type(module) for module in self._unknown())
        if classes or not self._layers or any(True for _ in self._beside_layers()):
            return [f"{cls.__name__}: {' '.join(read(cls).steps)}" for cls in classes]
        return None

    def _unknown(self) -> Iterator[nn.Module]:
        for name in self._attentions:
            parent = name.rpartition(".")[0]
            if parent not in self._layers:
                yield self._plan.model.get_submodule(parent)
        yield from self._experts.values()
        for layer in self._layers.values():
            known = layer_of(type(layer))
            assert known is not None
            for step in known.modules:
                child = layer.get_submodule(step)
                if step != known.attention and not self._knows(child):
                    yield child

    def _knows(self, module: nn.Module) -> bool:
        cls = type(module)
        forward = read(cls)
        return (
            self._plan.has(module)
            or not any(True for _ in module.parameters())
            or (forward.result is not None and forward.result == chained(forward.steps))
        )

    def _beside_layers(self) -> Iterator[nn.Module]:
        """What a decoder does not have beside its layers: more than one table, whose results it
        would add, or anything but norms and a head."""
        tables = 0
        for name, module in self._plan.model.named_modules():
            if not _within(name, self._models) or _within(name, self._layers):
                continue
            base = registry.find(type(module))
            if base is not None and issubclass(base, QuantEmbedding):
                tables += 1
                if tables > 1:
                    yield module
            elif base is None or not issubclass(base, (QuantLinear, QuantNorm)):
                if any(True for _ in module.parameters(recurse=False)):
                    yield module


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of these, or part of one."""
    return any(not outer or f"{name}.".startswith(f"{outer}.") for outer in modules)


def _are_modules(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether all that its forward calls are modules: others' calls may be functions."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _is_bare_norm(module: nn.Module) -> bool:
    """Whether it is a norm without a weight."""
    return registry.find(type(module)) is QuantRMSNorm and not any(
        True for _ in module.parameters()
    )
