"""FSDP2, DDP and torch.distributed.checkpoint: two processes on the CPU."""

import functools
import warnings

import pytest
import torch
from processes import run
from tiny_models import DECODERS, MIXTURES, gpt2, logits, next_token_loss, prepared, tokens
from torch import distributed as dist
from torch import nn

import asymq
from asymq import QuantConfig
from asymq.quantizers import named_quantizers

TABLE2 = QuantConfig.table2("min_max")
BATCH = (4, 12)


def mine(rank):
    return tokens(*BATCH)[2 * rank : 2 * rank + 2]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model):
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def one_process():
    model = prepared(gpt2(), "min_max")
    next_token_loss(model, tokens(*BATCH)).backward()
    return model


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        bound = 1e-3 * torch.maximum(value.abs().max(), 1e-3 * largest)
        assert ((actual[name] - value).abs() <= bound).all(), name


@functools.cache
def mesh():
    """Of the CPU, also where there is a GPU."""
    return dist.init_device_mesh("cpu", (2,))


def by_blocks(model, shard):
    for block in model.transformer.h:
        shard(block, mesh=mesh())
    return shard(model, mesh=mesh())


def _fsdp(rank, folder):
    from torch.distributed.fsdp import fully_shard

    expected = gradients(one_process())
    for shard in (asymq.shard, fully_shard):
        model = by_blocks(prepared(gpt2(), "min_max"), shard)
        ranges = [p for _, q in named_quantizers(model) for p in q.parameters(recurse=False)]
        split = [hasattr(p, "full_tensor") for p in ranges]
        assert all(split) if shard is fully_shard else not any(split)
        for repeat in range(2):  # gradients accumulate as those of one process
            next_token_loss(model, mine(rank)).backward()
            assert_close(gradients(model), {n: (repeat + 1) * g for n, g in expected.items()})
        optimizer = torch.optim.Adam(
            [{"params": asymq.weight_parameters(model)}, *asymq.range_parameters(model)], lr=1e-3
        )
        optimizer.step()
        # All processes agree, and what is saved is what they compute.
        asymq.save(model, folder / shard.__name__)
        with torch.no_grad():
            ours = model(tokens()).logits
        again = asymq.load(folder / shard.__name__)
        torch.testing.assert_close(logits(again, tokens()), ours, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"asymq\.convert: the model is split .*asymq\.load"):
            asymq.convert(model)
    with pytest.raises(RuntimeError, match=r"_quantizer: its ranges are split .*asymq\.shard"):
        asymq.calibrate(model, [tokens()])
    with pytest.raises(RuntimeError, match="its ranges are split among processes"):
        asymq.shard(model)


@pytest.mark.slow
def test_fsdp2(tmp_path):
    run(_fsdp, tmp_path)


def _read_through_quantizers(rank):
    """Weights that a forward not ours reads: norms', a scaled embedding's, experts'."""
    for make in (DECODERS["gemma3"], MIXTURES["mixtral"]):
        alone = prepared(make(), "min_max")
        next_token_loss(alone, tokens(*BATCH)).backward()
        model = prepared(make(), "min_max")
        for layer in model.model.layers:
            asymq.shard(layer, mesh=mesh())
        asymq.shard(model, mesh=mesh())
        next_token_loss(model, mine(rank)).backward()
        assert_close(gradients(model), gradients(alone))


@pytest.mark.slow
def test_weights_read_through_quantizers_are_sharded():
    run(_read_through_quantizers)


def _parts(rank):
    """c_fc alone is sharded: its parent must call it. And what prepare and shard refuse."""
    from torch.distributed.fsdp import fully_shard

    expected = gradients(one_process())
    model = prepared(gpt2(), "min_max")
    ranges = {p for _, q in named_quantizers(model) for p in q.parameters()}
    for block in model.transformer.h:
        fully_shard(block.mlp.c_fc, mesh=mesh(), ignored_params=ranges)
    asymq.shard(model, mesh=mesh())
    next_token_loss(model, mine(rank)).backward()
    assert_close(gradients(model), expected)

    sharded = fully_shard(gpt2(), mesh=mesh())
    with pytest.raises(ValueError, match=r"split among processes: prepare it first, then .*shard"):
        asymq.prepare(sharded, TABLE2)
    inner = nn.Sequential(nn.Linear(4, 4))
    fully_shard(inner[0], mesh=mesh())
    with pytest.raises(ValueError, match="prepare it first"):
        asymq.prepare(inner, QuantConfig(asymq.QuantSpec()))

    # Calibration after asymq.shard gathers the weights.
    late = asymq.shard(asymq.prepare(gpt2(), TABLE2), mesh=mesh())
    asymq.calibrate(late, [tokens(seed=seed) for seed in (3, 4)])
    expected = dict(named_quantizers(one_process()))
    for name, quantizer in named_quantizers(late):
        torch.testing.assert_close(
            quantizer.bounds(), expected[name].bounds(), rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.slow
def test_parts_that_are_sharded():
    run(_parts)


def _ddp(rank):
    """After prepare DDP averages every gradient, before it is refused."""
    expected = gradients(one_process())
    model = prepared(gpt2(), "min_max")
    wrapped = nn.parallel.DistributedDataParallel(model)
    next_token_loss(wrapped, mine(rank)).backward()
    assert_close(gradients(model), expected)
    early = nn.parallel.DistributedDataParallel(gpt2())
    with pytest.raises(ValueError, match=r"DistributedDataParallel wraps .*model\.module first"):
        asymq.prepare(early, TABLE2)


@pytest.mark.slow
def test_ddp():
    run(_ddp)


# ---- what resumes, and on how many processes -----------------------------------------------------


def _optimizer(model):
    weights = {"params": asymq.weight_parameters(model), "weight_decay": 0.1}
    return torch.optim.AdamW([weights, *asymq.range_parameters(model, lr=1e-2)], lr=1e-3)


def _losses(model, optimizer, batch):
    """Of two steps, over all processes."""
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = next_token_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= 2
    return losses


def _save(model, optimizer, folder):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=folder)


def _load(model, optimizer, folder):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def _sharded(model):
    model = by_blocks(model, asymq.shard)
    return model, _optimizer(model)


def _two_processes(rank, folder):
    # From one process to two.
    model, optimizer = _sharded(asymq.prepare(gpt2(), TABLE2))
    _load(model, optimizer, folder / "one")
    losses = _losses(model, optimizer, mine(rank))
    torch.testing.assert_close(losses, torch.load(folder / "one.pt"), rtol=1e-3, atol=0)

    # From two processes to one: what the first one writes is compared there.
    model, optimizer = _sharded(prepared(gpt2(), "min_max"))
    _losses(model, optimizer, mine(rank))
    _save(model, optimizer, folder / "fsdp")
    model.save_pretrained(folder / "pretrained")
    dist.barrier()
    fsdp = _losses(model, optimizer, mine(rank))

    model = prepared(gpt2(), "min_max")
    wrapped, optimizer = nn.parallel.DistributedDataParallel(model), _optimizer(model)
    _losses(wrapped, optimizer, mine(rank))
    _save(wrapped, optimizer, folder / "ddp")
    ddp = _losses(wrapped, optimizer, mine(rank))
    if rank == 0:
        torch.save({"fsdp": fsdp, "ddp": ddp}, folder / "two.pt")


@pytest.mark.slow
def test_resumes_on_another_number_of_processes(tmp_path):
    """With the losses that the processes that go on have: optimizer and ranges are as they were."""
    model = prepared(gpt2(), "min_max")
    optimizer = _optimizer(model)
    _losses(model, optimizer, tokens(*BATCH))
    _save(model, optimizer, tmp_path / "one")
    torch.save(_losses(model, optimizer, tokens(*BATCH)), tmp_path / "one.pt")

    run(_two_processes, tmp_path)
    expected = torch.load(tmp_path / "two.pt")
    for kind, losses in expected.items():
        model = asymq.prepare(gpt2(), TABLE2)
        optimizer = _optimizer(model)
        _load(model, optimizer, tmp_path / kind)
        if kind == "fsdp":
            again = type(gpt2()).from_pretrained(tmp_path / "pretrained")
            assert torch.equal(logits(again, tokens()), logits(model, tokens()))
        actual = _losses(model, optimizer, tokens(*BATCH))
        torch.testing.assert_close(actual, losses, rtol=1e-3, atol=0)
        assert actual[1] < actual[0]


def test_distributed_checkpoint(tmp_path):
    """A calibrated state loads into a fresh prepared model: no tensor's shape depends on it."""
    from torch.distributed import checkpoint as dcp

    model = prepared(gpt2(), "min_max")
    fresh = asymq.prepare(gpt2(), TABLE2)
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
        state = {"model": fresh.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
    fresh.load_state_dict(state["model"])
    assert torch.equal(logits(fresh, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_state_loads(dtype):
    model = prepared(gpt2(), "min_max")
    name = "lm_head.output_quantizer._extra_state"
    state = model.state_dict()
    state[name] = (state[name].to(dtype) + state[name].to(dtype)) / 2
    asymq.prepare(gpt2(), TABLE2).load_state_dict(state)


@pytest.mark.parametrize("damage", [lambda s: s.flip(0), lambda s: s.float() / 3, lambda s: s[:9]])
def test_a_damaged_state_is_named(damage):
    model = prepared(gpt2(), "min_max")
    name = "lm_head.output_quantizer"
    state = model.state_dict()
    state[f"{name}._extra_state"] = damage(state[f"{name}._extra_state"])
    with pytest.raises(RuntimeError, match=f"{name}: its _extra_state, a JSON .* is damaged"):
        asymq.prepare(gpt2(), TABLE2).load_state_dict(state)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["min_max", "beta_gamma"])
def test_data_parallel(setting):
    """Each replica quantizes a tied weight with its own copy of the ranges."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = prepared(gpt2(), setting).cuda()
    batch = tokens(*BATCH).cuda()
    expected = logits(model, batch)
    next_token_loss(model, batch).backward()
    alone = gradients(model)
    model.zero_grad()
    wrapped = nn.DataParallel(model, [0, 1])
    torch.testing.assert_close(logits(wrapped, batch), expected, rtol=1e-4, atol=1e-4)
    wrapped(batch, labels=batch).loss.mean().backward()
    assert_close(gradients(model), alone)


@pytest.mark.gpu
def test_data_parallel_of_subclasses():
    """Whose weights are read through properties, in a thread for each replica."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    class Scaled(nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    model = nn.Sequential(Scaled(8, 8), nn.ReLU(), Scaled(8, 4)).cuda()
    x = torch.randn(6, 8, device="cuda")
    asymq.prepare(model, QuantConfig(asymq.QuantSpec(4, True), asymq.QuantSpec(8)))
    asymq.calibrate(model, [x])
    expected = model(x)
    expected.sum().backward()
    alone = gradients(model)
    model.zero_grad()
    actual = nn.DataParallel(model, [0, 1])(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    actual.sum().backward()
    assert_close(gradients(model), alone)
