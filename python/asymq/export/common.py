"""What all targets ask of a model."""

from __future__ import annotations

from torch import nn

from asymq.conversion import weights_of_quantizers
from asymq.quantizers import QUANTIZING, Quantizer, is_split, named_quantizers
from asymq.wrappers import is_sharded, unwrap


def need_extra(what: str, extra: str, error: ImportError) -> ImportError:
    """What to raise where a package of an extra is missing."""
    return ImportError(
        f"{what} needs {error.name or error}: install the extra, pip install 'asymq[{extra}]'"
    )


def quantizers_of(model: nn.Module, what: str) -> tuple[nn.Module, dict[str, Quantizer]]:
    """The model without what others have put around it, and its quantizers by name.

    Refused, in sentences in which `what` is who exports: no quantizer, a quantizer that is off or
    observing, parameters that are split among processes, weights that were tied and are not any
    more (ValueError); a range that is not set (RuntimeError) or not finite (ValueError).
    """
    model = unwrap(model)
    quantizers = dict(named_quantizers(model))
    if not quantizers:
        raise ValueError(f"{what}: the model has no quantizers; call asymq.prepare first")
    if any(map(is_sharded, model.modules())) or any(map(is_split, model.parameters())):
        raise ValueError(
            f"{what}: the model is split among processes; export a whole one, such as asymq.load "
            "gives of what asymq.save writes"
        )
    for name, quantizer in quantizers.items():
        if quantizer.state != QUANTIZING:
            raise ValueError(
                f"{what}: {name} is {quantizer.state}: call asymq.enable_quantizers(model), or "
                "leave it out when the model is prepared (skip)"
            )
        if not quantizer.calibrated:
            raise RuntimeError(
                f"{what}: {name}: its range is not set; calibrate the model first "
                "(asymq.calibrate), or load a calibrated state"
            )
        ranges = (getattr(quantizer, own) for own in (*quantizer.learned, *quantizer.constants))
        if not all(bool(tensor.isfinite().all()) for tensor in ranges):
            raise ValueError(
                f"{what}: {name}: its range is {quantizer.describe_range()}, which no file can "
                "hold: load a state from before it became so"
            )
    weights_of_quantizers(model, what)
    return model, quantizers
