"""What training needs beside the model: parameters for optimizers, step rules, learning rates that
follow the codes that change, weights that oscillate, distillation, settings to begin with, a
captured step, sharding."""

from asymq.training.capture import capture_step
from asymq.training.distillation import SelfDistillation
from asymq.training.oscillation import OscillationObserver
from asymq.training.ranges import (
    freeze_weight_ranges,
    freeze_weights,
    range_parameters,
    warn_of_decay,
    weight_parameters,
)
from asymq.training.recommendations import Recommended, recommended
from asymq.training.shard import shard
from asymq.training.step_rules import attach_step_rule
from asymq.training.transition_rate import TransitionRateScheduler

__all__ = [
    "OscillationObserver",
    "Recommended",
    "SelfDistillation",
    "TransitionRateScheduler",
    "attach_step_rule",
    "capture_step",
    "freeze_weight_ranges",
    "freeze_weights",
    "range_parameters",
    "recommended",
    "shard",
    "warn_of_decay",
    "weight_parameters",
]
