"""One cell: a Llama trained from scratch, on tokens that it sees once.

On a GPU a step is bfloat16 autocast with float32 weights, in one CUDA graph; on a CPU float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import asymq
from asymq.experiments.common.files import BadInput
from asymq.experiments.scaling_law.cells import Cell, Settings
from asymq.experiments.scaling_law.tokens import Tokens

WARM_UP, LOWEST_RATE = 0.05, 0.1  # of the steps, of the highest rate
DECAY, CLIP, BETAS = 0.1, 1.0, (0.9, 0.95)
LAST = 10  # the loss of a cell is the mean of the last 1/LAST of its steps
HELD_OUT = 128  # batches, at most

# Under this name transformers makes no mask, whose values it would read while a step is captured.
CAUSAL = "asymq_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def build(cell: Cell, settings: Settings, vocabulary: int) -> nn.Module:
    """A function of size and seed: a baseline and its quantized models start with the same
    weights."""
    width = cell.size.width
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=cell.size.layers,
        num_attention_heads=width // settings.head,
        num_key_value_heads=width // settings.head,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=CAUSAL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model = LlamaForCausalLM(config)
    if cell.config is not None:
        asymq.prepare(model, cell.config)
    return model


class Training:
    """A cell on a device, ready for its first step; every `step()` finds its own batch and rate, so
    that it can be captured."""

    def __init__(self, cell: Cell, settings: Settings, tokens: Tokens, device: torch.device):
        self.cell, self.device = cell, device
        self.steps = settings.steps(cell.tokens)
        count = self.steps * settings.batch
        self._windows = _windows(tokens.train, count, settings.context).to(device)
        generator = torch.Generator().manual_seed(cell.seed)
        order = torch.randperm(count, generator=generator)
        self._order = order.view(self.steps, settings.batch).to(device)
        held = min(len(tokens.held_out) // settings.context, HELD_OUT * settings.batch)
        self._held_out = _windows(tokens.held_out, held, settings.context).split(settings.batch)
        self.model: Any = build(cell, settings, tokens.vocabulary).to(device).train()
        self._rates = _rates(settings.rate(cell.size), self.steps).to(device)
        self._counter = torch.zeros(1, dtype=torch.long, device=device)
        self._losses = torch.zeros(self.steps, device=device)
        self._rate = self._rates[0].clone()
        self._parameters = list(self.model.parameters())
        self._optimizer = torch.optim.AdamW(
            _groups(self.model), lr=self._rate, betas=BETAS, fused=True, capturable=self._on_gpu
        )

    def _loss(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._on_gpu):
            logits = self.model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def step(self) -> None:
        self._optimizer.zero_grad()
        self._rate.copy_(self._rates.index_select(0, self._counter)[0])
        rows = self._order.index_select(0, self._counter)[0]
        loss = self._loss(self._windows.index_select(0, rows).long())
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, CLIP, foreach=True)
        self._optimizer.step()
        self._losses.index_copy_(0, self._counter, loss.detach()[None])
        self._counter.add_(1)

    def repeatable(self) -> tuple[Callable[[], None], int]:
        """What takes a step, and how many it has taken already."""
        warm_up = 3
        return (asymq.capture_step(self.step, warm_up), warm_up) if self._on_gpu else (self.step, 0)

    def run(self, show: Callable[[int, float], None]) -> tuple[float, float, float]:
        """The mean loss of the last tenth of the steps, that of held-out text, and the seconds that
        the steps took. `show` is told of a loss ten times. BadInput: the loss is not finite."""
        step, done = self.repeatable()
        start = time.perf_counter()
        for number in range(done + 1, self.steps + 1):
            step()
            if number % max(1, self.steps // LAST) == 0:
                show(number, self._losses[number - 1].item())
        loss = self._losses[-math.ceil(self.steps / LAST) :].double().mean().item()
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise BadInput(f"{self.cell}: its loss is not finite; give a lower --lr")
        return loss, self._evaluate(), seconds

    @torch.no_grad()
    def _evaluate(self) -> float:
        losses = [self._loss(ids.to(self.device).long()) for ids in self._held_out]
        sizes = [len(ids) for ids in self._held_out]
        return float(sum(x.item() * n for x, n in zip(losses, sizes, strict=True)) / sum(sizes))


def _windows(ids, count: int, context: int) -> Tensor:
    """The first `count` windows [count, context]."""
    return torch.from_numpy(ids[: count * context].astype("int32")).view(count, context)


def _rates(highest: float, steps: int) -> Tensor:
    at = torch.arange(steps, dtype=torch.float64)
    warm_up = ((at + 1) / max(1, WARM_UP * steps)).clamp(max=1)
    cosine = LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + torch.cos(torch.pi * at / steps))
    return (highest * warm_up * cosine).float()


def _groups(model: nn.Module) -> list[dict]:
    """Of the optimizer: what decays is the matrices."""
    weights = asymq.weight_parameters(model)
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": DECAY},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    learned = any(q.spec.learn for _, q in asymq.named_quantizers(model))
    return groups + (asymq.range_parameters(model) if learned else [])
