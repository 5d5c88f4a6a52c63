"""What only a GPU can show: CPU = CUDA bit for bit, sizes, streams, graphs, no synchronisation."""

import itertools

import pytest
import tiny_models
import torch
from compare import assert_bit_equal, assert_sums, term_sizes
from samples import COVERING, DTYPES, LINKS, SAMPLES, DynamicSample, Sample

import asymq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

VALUES = [Sample(values="nan"), Sample("scale_offset", "float16", "groups", values="nan")]


def step(sample, inputs):
    x, parameters, grad = inputs
    leaves = (x, *parameters[: len(sample.spec.learned)])
    xhat = sample.call(asymq, x, *parameters)
    return xhat, *torch.autograd.grad(xhat, leaves, grad)


@pytest.mark.parametrize("sample", [*SAMPLES, *VALUES, *COVERING], ids=str)
def test_cpu_equals_cuda(sample):
    """x̂ and dL/dx to the last bit, the sums within their accuracy."""
    cpu, cuda = sample.build("cpu"), sample.build("cuda")
    expected, actual = step(sample, cpu), step(sample, cuda)
    exact = cpu.parameters[0].dtype == torch.float64
    for e, a in zip(expected[:2], actual[:2], strict=True):
        if sample.loose:
            torch.testing.assert_close(a.cpu(), e, rtol=1e-12, atol=0, equal_nan=True)
        else:
            assert_bit_equal(a.cpu(), e)
        assert a.stride() == e.stride()
    terms = term_sizes(sample, asymq, *cpu)
    for e, a, size in zip(expected[2:], actual[2:], terms, strict=True):
        # Both sides may be 1e-6 of Σ|terms| off.
        assert_sums(a.cpu(), e, 2 * size, exact=exact)


@pytest.mark.parametrize("link", LINKS)
def test_links_of_every_kind_of_argument(link):
    """They are computed in float64 and rounded once: the grids agree on both devices."""
    gamma = torch.cat([torch.linspace(-30, 30, 100_001), torch.randn(100_000)]).unsqueeze(-1)
    x = torch.rand(len(gamma), 4) * 2 - 1
    one = torch.ones_like(gamma)

    def call(*tensors):
        return asymq.fake_quantize_symmetric_gamma(*tensors, bits=8, link=link)

    assert_bit_equal(call(x.cuda(), gamma.cuda(), one.cuda()).cpu(), call(x, gamma, one))


def test_codes_equal_on_both_devices():
    for bits, dtype in itertools.product((3, 8, 12, 16), (torch.float32, torch.bfloat16)):
        x = torch.randn(1001, 96).to(dtype)
        low, high = -torch.rand(1, 96), torch.rand(1, 96)
        cpu = asymq.effective_scale_offset("min_max", low, high, bits=bits)
        cuda = asymq.effective_scale_offset("min_max", low.cuda(), high.cuda(), bits=bits)
        codes = asymq.quantize(x, *cpu, bits=bits)
        assert torch.equal(asymq.quantize(x.cuda(), *cuda, bits=bits).cpu(), codes)
        values = asymq.dequantize(codes, *cpu, bits=bits)
        assert_bit_equal(asymq.dequantize(codes.cuda(), *cuda, bits=bits).cpu(), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, ranges",
    [
        ((1,), (1,)),
        ((8193,), (1,)),
        ((3, 5_000_001), (1,)),
        ((3, 5_000_001), (3, 1)),
        ((2, 4_000_000), (2, 1)),
        ((4099, 96), (4099, 1)),
        ((4099, 96), (4099, 3)),
        ((513, 768), (513, 24)),
        ((50257, 768), (50257, 1)),
        ((2048, 3072), (1, 3072)),
        ((2047, 3071), (1, 3071)),
        ((64, 32, 3, 3), (64, 1, 1, 1)),
        ((64, 32, 3, 3), (1, 32, 1, 1)),
        ((48, 30), (16, 15)),
    ],
    ids=str,
)
def test_codes_are_updated_alike_on_both_devices(shape, ranges, dtype):
    """On every path of the kernel: bit-equal codes, the exact count, nothing written beside."""
    x = torch.randn(shape).to(dtype)
    scale, offset = 0.05 + 0.2 * torch.rand(ranges), (-4 * torch.rand(ranges)).round()
    for z in (offset, None):
        codes = asymq.quantize(x, scale, z, bits=4)
        # Between guards.
        around = torch.full((codes.numel() + 64,), 77, dtype=codes.dtype, device="cuda")
        on_cuda = around[32:-32].view(shape)
        on_cuda.copy_(codes)
        x2 = torch.where(torch.rand(shape) < 0.01, -x, x)
        z_cuda = None if z is None else z.cuda()
        for _ in range(2):
            expected = asymq.update_codes_(codes, x2, scale, z, bits=4)
            actual = asymq.update_codes_(on_cuda, x2.cuda(), scale.cuda(), z_cuda, bits=4)
            assert torch.equal(on_cuda.cpu(), codes) and actual.cpu() == expected
        assert (around[:32] == 77).all() and (around[-32:] == 77).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("factors", ["one", "positions", "own"])
@pytest.mark.parametrize(
    "vectors", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 127, 128, 129, 256, 257, 1000, 4096, 4097]
)
def test_live_ranges_around_every_switch(vectors, factors, dtype):
    """Groups of so many accesses, of 16 bytes and, from an odd start, of one element: for lanes, a
    block, longer; few rows and many."""
    dtype, factor_dtype = DTYPES[dtype]
    width = 16 // dtype.itemsize
    for size, start, rows in (
        (vectors * width, 0, 5),
        (vectors * width, 0, 1 + 2**14 // vectors),
        (vectors, 1, 5),
        (vectors, 1, 1 + 2**12 // vectors),
        (vectors * width + 1, 0, 3),
    ):
        shape = (rows, 3 * size)
        x, grad = (torch.randn(start + rows * 3 * size).to(dtype) for _ in range(2))
        x, grad = x[start:].view(shape), grad[start:].view(shape)
        count = {"one": (1,), "positions": (3,), "own": (rows, 3)}[factors]
        learned = [(0.6 + torch.rand(count) / 2).to(factor_dtype) for _ in range(2)]

        def step(device, x=x, grad=grad, learned=learned, size=size, start=start):
            def place(tensor):
                # Memory of its own would start at a multiple of 16 bytes.
                room = torch.empty(start + tensor.numel(), dtype=tensor.dtype, device=device)
                return room[start:].view(tensor.shape).copy_(tensor)

            leaves = [t.requires_grad_() for t in (place(x), *(p.to(device) for p in learned))]
            if factors == "own":
                xhat = asymq.ops._fake_quantize_live(*leaves, group=size, bits=4)
            else:
                xhat = asymq.fake_quantize_dynamic_beta_gamma(*leaves, group=size, bits=4)
            return xhat, *torch.autograd.grad(xhat, leaves, place(grad))

        expected, actual = step("cpu"), step("cuda")
        for e, a in zip(expected[:2], actual[:2], strict=True):
            assert_bit_equal(a.cpu(), e)
        terms = (x.abs().amax() * grad.double().abs()).view(rows, 3, size).sum(-1)
        if factors != "own":
            terms = terms.sum(0) if factors == "positions" else terms.sum().view(1)
        exact = factor_dtype == torch.float64
        for e, a in zip(expected[2:], actual[2:], strict=True):
            assert_sums(a.cpu(), e, 2 * terms, exact=exact)


@pytest.mark.parametrize("group", [None, 4096, 96])
def test_one_long_row_of_live_range(group):
    """Read by many blocks, whose extrema and sums meet."""
    x, grad = torch.randn(2, 1, 3 * 2**19).to(torch.bfloat16)
    beta, gamma = torch.tensor([0.9]), torch.tensor([0.7])

    def step(device):
        leaves = [t.to(device).requires_grad_() for t in (x, beta, gamma)]
        xhat = asymq.fake_quantize_dynamic_beta_gamma(*leaves, group=group, bits=8)
        return xhat, *torch.autograd.grad(xhat, leaves, grad.to(device))

    expected, actual, again = step("cpu"), step("cuda"), step("cuda")
    for e, a in zip(expected[:2], actual[:2], strict=True):
        assert_bit_equal(a.cpu(), e)
    terms = (x.abs().amax() * grad.double().abs()).sum().view(1)
    for e, a in zip(expected[2:], actual[2:], strict=True):
        assert_sums(a.cpu(), e, 2 * terms)
    for a, b in zip(actual, again, strict=True):
        assert_bit_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_more_than_2_to_31_elements(granularity):
    """bfloat16, forward and backward: every element is there and no index has wrapped."""
    rows, columns = 2**16 + 1, 2**15 + 8
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * columns:
        pytest.skip("not enough GPU memory")
    pattern = torch.tensor([-9.0, 0.25, 9.0, 1.0], device="cuda", dtype=torch.bfloat16)
    x = pattern.repeat(rows, columns // 4).requires_grad_()
    shape = {"tensor": (1,), "row": (rows, 1), "column": (1, columns)}[granularity]
    scale = torch.ones(shape, device="cuda", requires_grad=True)
    offset = torch.full(shape, -3.0, device="cuda", requires_grad=True)
    xhat = asymq.fake_quantize_scale_offset(x, scale, offset, bits=3)
    grid = torch.tensor([-3.0, 0.0, 4.0, 1.0], device="cuda", dtype=torch.bfloat16)
    assert torch.equal(xhat[0].view(-1, 4), grid.expand(columns // 4, 4))
    assert all((xhat[r] == xhat[0]).all() for r in (rows // 2, rows - 2, rows - 1))

    grad = torch.ones((), device="cuda", dtype=torch.bfloat16).expand_as(xhat)
    del xhat
    d_x, d_scale, d_offset = torch.autograd.grad(
        asymq.fake_quantize_scale_offset(x, scale, offset, bits=3), (x, scale, offset), grad
    )
    inside = torch.tensor([0.0, 1.0, 0.0, 1.0], device="cuda", dtype=torch.bfloat16)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(d_x[row].view(-1, 4), inside.expand(columns // 4, 4))
    # Per four elements: -3 below, 0 - 0.25 inside, 4 above; the offset gets s from both outside.
    if granularity == "column":
        expected_scale = torch.tensor([-3.0, -0.25, 4.0, 0.0], device="cuda") * rows
        expected_offset = torch.tensor([1.0, 0.0, 1.0, 0.0], device="cuda") * rows
        expected_scale = expected_scale.repeat(columns // 4).view(shape)
        expected_offset = expected_offset.repeat(columns // 4).view(shape)
    else:
        count = x.numel() / scale.numel() / 4
        expected_scale = torch.full_like(scale, 0.75 * count)
        expected_offset = torch.full_like(scale, 2.0 * count)
    torch.testing.assert_close(d_scale, expected_scale, rtol=2e-6, atol=0)
    torch.testing.assert_close(d_offset, expected_offset, rtol=2e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("group", [None, 128, 8])
def test_live_ranges_of_more_than_2_to_31_elements(group):
    """Rows that repeat have results and gradients that repeat; so does one row of them all."""
    rows, columns = 2**16 + 1, 2**15 + 128
    if torch.cuda.mem_get_info()[0] < 6 * 2 * rows * columns:
        pytest.skip("not enough GPU memory")
    row = torch.randn(1, columns, device="cuda").to(torch.bfloat16)
    grad = torch.rand(1, columns, device="cuda").to(torch.bfloat16)
    for shape in ((rows, columns), (1, rows * columns)):

        def step(x, grad):
            factors = [torch.full((1,), 0.8, device="cuda", requires_grad=True) for _ in range(2)]
            leaves = (x.requires_grad_(), *factors)
            xhat = asymq.fake_quantize_dynamic_beta_gamma(*leaves, group=group, bits=4)
            return xhat, *torch.autograd.grad(xhat, leaves, grad)

        expected = step(row.clone(), grad)
        repeated = (tensor.repeat(rows, 1).view(shape) for tensor in (row, grad))
        actual = step(*repeated)
        for e, a in zip(expected[:2], actual[:2], strict=True):
            assert (a.view(rows, columns) == e).all()
        for e, a in zip(expected[2:], actual[2:], strict=True):
            torch.testing.assert_close(a, rows * e, rtol=2e-5, atol=0)


GRANULARITIES = ["one", "axis0", "last", "groups", "blocks_two"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_works_on_the_current_stream(granularity):
    """Enqueued behind work of the same stream that produces its input."""
    sample = Sample("beta_gamma", granularity=granularity, size="millions")
    inputs = sample.build("cuda")
    expected = step(sample, inputs)
    values = inputs.x.detach().clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with torch.no_grad():
            inputs.x.zero_()
            torch.cuda._sleep(100_000_000)
            inputs.x.copy_(values)
        actual = step(sample, inputs)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert_bit_equal(a, e)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_never_synchronises(granularity):
    sample = Sample("beta_gamma_sigmoid", granularity=granularity, layout="transposed_gradient")
    inputs = sample.build("cuda")
    step(sample, inputs)
    scale = torch.ones(1, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(sample, inputs)
        codes = asymq.quantize(inputs.x, scale, scale, bits=8)
        asymq.dequantize(codes, scale, scale, bits=8)
        asymq.update_codes_(codes, inputs.x, scale, scale, bits=8)
        asymq.effective_scale_offset("min_max", scale, scale, bits=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_of_an_update_of_codes():
    """The count starts from 0 in every replay."""
    x, scale = torch.randn(300, 64, device="cuda"), torch.full((1,), 0.1, device="cuda")
    codes = asymq.quantize(x, scale, bits=4)
    asymq.update_codes_(codes, x, scale, bits=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        changed = asymq.update_codes_(codes, x, scale, bits=4)
    for expected in (codes.count_nonzero(), 0):
        x.zero_()
        graph.replay()
        assert changed == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_cuda_graph_of_a_training_step(granularity):
    """Captured forward and backward, replayed on new values."""
    sample = Sample("min_max", granularity=granularity, size="millions")
    inputs = sample.build("cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(sample, inputs)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(sample, inputs)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            inputs.x.mul_(scale)
            inputs.parameters[1].mul_(scale)
        graph.replay()
        for a, e in zip(captured, step(sample, inputs), strict=True):
            assert_bit_equal(a, e)


@pytest.mark.parametrize("granularity", ["token", "groups", "positions"])
def test_cuda_graph_of_live_ranges(granularity):
    """Captured forward and backward, which read nothing back, replayed on new values."""
    sample = DynamicSample(granularity=granularity, size="millions")
    inputs = sample.build("cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(sample, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(sample, inputs)
    for shift in (0.0, 0.5):
        with torch.no_grad():
            inputs.x.add_(shift)
            inputs.parameters[1].mul_(0.5)
        graph.replay()
        for a, e in zip(captured, step(sample, inputs), strict=True):
            assert_bit_equal(a, e)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_device():
    """Runs where its tensors are, not on the current device; a range elsewhere is an error."""
    sample = Sample("beta_gamma", granularity="last", size="millions")
    with torch.cuda.device(0):
        expected = step(sample, sample.build("cuda:0"))
        actual = step(sample, sample.build("cuda:1"))
        for a, e in zip(actual, expected, strict=True):
            assert a.device == torch.device("cuda:1")
            assert_bit_equal(a.cpu(), e.cpu())
        x = torch.zeros(4, device="cuda:1")
        with pytest.raises(RuntimeError, match="scale must be on x's device cuda:1, got cuda:0"):
            asymq.fake_quantize_symmetric_scale(x, torch.ones(1, device="cuda:0"), bits=8)


def test_ranges_on_another_device():
    x = torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match="scale must be on x's device cuda:0, got cpu"):
        asymq.fake_quantize_symmetric_scale(x, torch.ones(1), bits=8)


def test_memory():
    """Forward and backward hold x̂ and dL/dx, nothing else of x's size."""
    x = torch.randn(2**24, device="cuda", requires_grad=True)
    ends = [torch.full((1,), v, device="cuda", requires_grad=True) for v in (-1.0, 1.0)]
    size = x.numel() * x.element_size()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    xhat = asymq.fake_quantize_min_max(x, *ends, bits=8)
    torch.autograd.grad(xhat, (x, *ends), x.detach())
    assert torch.cuda.max_memory_allocated() - before < 2.1 * size


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_captured_step_trains_as_eager(family):
    batches = [tiny_models.tokens(seed=seed).cuda() for seed in range(6)]

    def learn(captured: bool) -> tuple[list, list]:
        model = tiny_models.prepared(getattr(tiny_models, family)()).cuda().train()
        asymq.freeze_weights(model)
        ids = batches[0].clone()
        optimizer = torch.optim.Adam(asymq.range_parameters(model), lr=1e-3, capturable=True)

        def step():
            optimizer.zero_grad()
            loss = tiny_models.next_token_loss(model, ids)
            loss.backward()
            optimizer.step()
            return loss

        if captured:
            step = asymq.capture_step(step, warmup=2)
        else:
            for _ in range(2):
                step()
        losses = []
        for batch in batches:
            ids.copy_(batch)
            losses.append(step().item())
        return losses, [p.detach() for group in optimizer.param_groups for p in group["params"]]

    (losses, ranges), (expected, eager) = learn(True), learn(False)
    assert len(set(losses)) == len(batches)
    assert losses == pytest.approx(expected, rel=1e-5)
    for a, b in zip(ranges, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
