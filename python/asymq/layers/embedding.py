"""nn.Embedding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from asymq.layers.layer import WEIGHT, QuantLayer
from asymq.layers.registry import quantizes
from asymq.quantizers import QuantSpec


@quantizes(nn.Embedding)
class QuantEmbedding(QuantLayer, nn.Embedding):
    """nn.Embedding with a quantized weight. What it returns is on its weight's grid: it has no
    output quantizer.

    Range shapes of the weight: [1], [num_embeddings, 1], [num_embeddings, embedding_dim / size].
    """

    float_class = nn.Embedding
    made_of = "nn.Embedding"
    has_output = multiplies = False

    def __init__(self, *args, weight: QuantSpec | None = WEIGHT, **kwargs):
        nn.Embedding.__init__(self, *args, **kwargs)
        self._create(weight, None, None)

    @classmethod
    def left_alone(cls, module: nn.Module) -> bool:
        return _changes_rows(module) or super().left_alone(module)

    @classmethod
    def check(cls, module: nn.Module, weight: QuantSpec | None, label: str) -> None:
        super().check(module, weight, label)
        if _changes_rows(module):
            raise ValueError(
                f"{label}: max_norm and sparse gradients change the weight or its gradient row by "
                "row; the ranges cannot follow"
            )

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.quantized_weight(),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )


def _changes_rows(module: nn.Module) -> bool:
    return module.max_norm is not None or module.sparse
