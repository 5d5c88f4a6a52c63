"""What one quantizer is: a spec, its range tensors, a state."""

from asymq.quantizers.activation import QuantAct
from asymq.quantizers.functions import use_functions
from asymq.quantizers.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
)
from asymq.quantizers.observers import EXACT, METHODS, Observer
from asymq.quantizers.quantizer import (
    OBSERVING,
    OFF,
    QUANTIZING,
    Quantizer,
    apply,
    convert_parameterization,
    disable_quantizers,
    enable_quantizers,
    is_split,
    is_unobserved,
    named_quantizers,
)
from asymq.quantizers.sharing import generating, sharing
from asymq.quantizers.spec import LINKS, PARAMETERIZATIONS, QuantSpec, split_parameterization
from asymq.quantizers.weight import NormWeightQuantizer, WeightQuantizer, elements

__all__ = [
    "EXACT",
    "LINKS",
    "METHODS",
    "OBSERVING",
    "OFF",
    "PARAMETERIZATIONS",
    "QUANTIZING",
    "Granularity",
    "NormWeightQuantizer",
    "Observer",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QuantAct",
    "QuantSpec",
    "Quantizer",
    "WeightQuantizer",
    "apply",
    "convert_parameterization",
    "disable_quantizers",
    "elements",
    "enable_quantizers",
    "generating",
    "is_split",
    "is_unobserved",
    "named_quantizers",
    "sharing",
    "split_parameterization",
    "use_functions",
]
