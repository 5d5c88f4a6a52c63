"""What training needs beside the model: parameters for optimizers, step rules, a captured step,
sharding."""

from asymq.training.capture import capture_step
from asymq.training.distillation import SelfDistillation
from asymq.training.ranges import (
    freeze_weights,
    range_parameters,
    warn_of_decay,
    weight_parameters,
)
from asymq.training.shard import shard
from asymq.training.step_rules import attach_step_rule

__all__ = [
    "SelfDistillation",
    "attach_step_rule",
    "capture_step",
    "freeze_weights",
    "range_parameters",
    "shard",
    "warn_of_decay",
    "weight_parameters",
]
