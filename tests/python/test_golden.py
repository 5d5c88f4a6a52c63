"""Every golden vector, by the operators and by the reference, in float32 and float64."""

import json
from pathlib import Path

import pytest
import torch
from compare import spread

import asymq
from asymq import reference

pytestmark = pytest.mark.composite

GOLDEN = Path(__file__).parent.parent / "golden"
DYNAMIC = json.loads((GOLDEN / "dynamic_per_token.json").read_text())["cases"]
TRAIN = json.loads((GOLDEN / "train.json").read_text())["cases"]
LINKS = [case for case in TRAIN if case["kind"] == "link"]
FUNCTIONS = {
    "scale_offset": ("scale_offset", {}),
    "min_max": ("min_max", {}),
    "beta_gamma": ("beta_gamma", {}),
    "beta_gamma_sigmoid": ("beta_gamma", {"sigmoid": True}),
    "kscale_koffset": ("kscale_koffset", {}),
    "sym_scale": ("scale_offset", {"symmetric": True}),
    "sym_max": ("min_max", {"symmetric": True}),
    "sym_gamma": ("beta_gamma", {"symmetric": True}),
    "sym_gamma_sigmoid": ("beta_gamma", {"symmetric": True, "sigmoid": True}),
}
SYMMETRIC = {"scale_offset": "scale", "min_max": "max", "beta_gamma": "gamma"}


def _cases():
    for name in FUNCTIONS:
        golden = json.loads((GOLDEN / f"{name}.json").read_text())
        for case in golden["cases"]:
            yield pytest.param(golden["param"], case, id=case["case"])


def _tolerance(name, partial, k):
    if name == "s":
        return torch.full_like(partial, 2.5e-7 * k)
    return 3e-6 * partial.abs().clamp_min(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("module", [asymq, reference], ids=["operators", "reference"])
@pytest.mark.parametrize("parameterization, case", list(_cases()))
def test_golden(parameterization, case, module, dtype, device):
    name, options = FUNCTIONS[parameterization]
    k, symmetric = case["k"], options.get("symmetric", False)
    function = f"symmetric_{SYMMETRIC[name]}" if symmetric else name
    function = getattr(module, f"fake_quantize_{function}")
    keywords = {"bits": case["bits"]}
    keywords |= {"sigmoid": True} if options.get("sigmoid") else {}

    def tensor(values):
        return torch.tensor(values, dtype=dtype, device=device)

    def exact(values):
        return torch.tensor(values, dtype=torch.float64, device=device)

    x, upstream = tensor(case["x"]).requires_grad_(), tensor(case["upstream"])
    learned = [tensor(v).requires_grad_() for v in case["learnable"].values()]
    fixed = [tensor(v) for v in case["const"].values()]

    # The call as a user makes it: values, dL/dx and the sums.
    xhat = function(x, *learned, *fixed, **keywords)
    grad_x, *grads = torch.autograd.grad(xhat, (x, *learned), upstream)
    loosen = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(xhat.double(), exact(case["xhat"]), rtol=loosen, atol=0)
    assert torch.equal(grad_x, tensor(case["grad_x"]))

    scale, offset = module.effective_scale_offset(
        name, *(p.detach() for p in learned), *fixed, bits=case["bits"], **options
    )
    codes = module.quantize(x.detach(), scale, offset, bits=case["bits"])
    assert torch.equal(codes.double(), exact(case["xbar"]))
    least = -(k - 1) // 2 if symmetric else 0
    outside = torch.where(codes == least, -1, 1)
    assert torch.equal(torch.where(grad_x != 0, 0, outside).double(), exact(case["region"]))

    # A range of its own for every element: the gradients are the partial derivatives.
    own = [spread(p.detach(), x.shape).requires_grad_() for p in learned]
    xhat = function(x.detach(), *own, *(spread(p, x.shape) for p in fixed), **keywords)
    partials = torch.autograd.grad(xhat, own, torch.ones_like(xhat))
    reduced = () if case["granularity"] == "per_tensor" else (1,)
    for key, grad, partial in zip(case["learnable"], grads, partials, strict=True):
        expected = exact(case["partial"][key])
        tolerance = _tolerance(key, expected, k) * (1 if dtype == torch.float32 else 1e-6)
        error = (partial.double() - expected).abs()
        assert (error <= tolerance).all(), f"∂{key} off by {(error / tolerance).max():.3g}"

        error = (grad.double().flatten() - exact(case["grad"][key]).flatten()).abs()
        tolerance = (upstream.double().abs() * tolerance).sum(reduced)
        assert (error <= tolerance).all(), f"dL/d{key} off by {(error / tolerance).max():.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("module", [asymq, reference], ids=["operators", "reference"])
@pytest.mark.parametrize("case", LINKS, ids=[f"{c['link']}-{c['bits']}" for c in LINKS])
def test_golden_of_links(case, module, dtype, device):
    def tensor(values):
        return torch.tensor(values, dtype=torch.float64, device=device).to(dtype)

    x, upstream = tensor(case["x"]).requires_grad_(), tensor(case["upstream"])
    factors = [tensor([case[name]]).requires_grad_() for name in ("beta", "gamma")]
    ends = tensor([case["min"]]), tensor([case["max"]])
    options = {"bits": case["bits"], "link": case["link"]}
    xhat = module.fake_quantize_beta_gamma(x, *factors, *ends, **options)
    grad_x, *grads = torch.autograd.grad(xhat, (x, *factors), upstream)
    loosen = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(xhat, tensor(case["xhat"]), rtol=loosen, atol=0)
    assert torch.equal(grad_x, tensor(case["grad_x"]))
    for name, grad in zip(("grad_beta", "grad_gamma"), grads, strict=True):
        # Their terms cancel, and are at most as large as the ends and the upstream gradients.
        size = 4.7 * upstream.double().abs().sum().item()
        assert abs(grad.item() - case[name]) <= loosen * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("module", [asymq, reference], ids=["operators", "reference"])
@pytest.mark.parametrize("case", DYNAMIC, ids=[case["case"] for case in DYNAMIC])
def test_golden_of_live_ranges(case, module, dtype, device):
    def exact(values):
        return torch.tensor(values, dtype=torch.float64, device=device)

    kind, bits = case["kind"], case["bits"]
    x, upstream = (exact(case[name]).to(dtype) for name in ("x", "upstream"))
    x.requires_grad_()
    learned = [exact(v).to(dtype).requires_grad_() for v in case["learnable"].values()]
    keywords = {"bits": bits, "eps": case["eps"]} | ({"sigmoid": True} if case["sigmoid"] else {})
    keywords |= {"full_range": True} if kind.endswith("full_range") else {}
    if kind == "static_full_range":
        ends = exact(case["theta_max"]).flatten()
        function, constants = module.fake_quantize_symmetric_gamma, (ends[:1].to(dtype),)
        assert (ends == ends[0]).all()
    else:
        name = "beta_gamma" if kind == "asymmetric" else "symmetric_gamma"
        function, constants = getattr(module, f"fake_quantize_dynamic_{name}"), ()
        keywords |= {"group": case["group"]}

    xhat = function(x, *learned, *constants, **keywords)
    grad_x, *grads = torch.autograd.grad(xhat, (x, *learned), upstream, retain_graph=True)
    loosen = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(xhat.double(), exact(case["xhat"]), rtol=loosen, atol=0)
    assert torch.equal(grad_x, exact(case["grad_x"]).to(dtype))

    def of_elements(values):
        """One value per group to one per element."""
        values = exact(values)
        return values.repeat_interleave(x.shape[-1] // values.shape[-1], -1)

    codes = (xhat.double() / of_elements(case["s"])).round()
    codes = codes - of_elements(case["n"]) if kind == "asymmetric" else codes
    assert torch.equal(codes, exact(case["xbar"]))

    for place in range(x.numel()):
        one = torch.zeros_like(xhat).flatten()
        one[place] = 1
        partials = torch.autograd.grad(xhat, learned, one.view_as(xhat), retain_graph=True)
        for key, partial in zip(case["learnable"], partials, strict=True):
            expected = exact(case["partial"][key]).flatten()[place]
            error = (partial.double().sum() - expected).abs()
            assert error <= 3 * loosen * expected.abs().clamp_min(1), f"∂{key} at {place}"
    for key, grad in zip(case["learnable"], grads, strict=True):
        expected, size = exact(case["grad"][key]), exact(case["partial"][key]).abs().clamp_min(1)
        tolerance = 3 * loosen * (upstream.double().abs() * size).sum()
        assert ((grad.double().flatten() - expected.flatten()).abs() <= tolerance).all()


def test_all_golden_vectors_are_here():
    names = [*FUNCTIONS, "dynamic_per_token", "scaling_law", "train", "transition_rate"]
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == sorted(names)
    assert len(list(_cases())) == 129 and len(DYNAMIC) == 12 and len(LINKS) == 4
