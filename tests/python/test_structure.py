"""Rules that keep the design: the mathematics once, kernels without torch, no host syncs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sources(*folders, suffixes=(".h", ".cpp", ".cu", ".cuh")):
    files = [p for folder in folders for p in sorted((ROOT / folder).rglob("*"))]
    files = [p for p in files if p.suffix in suffixes]
    assert files, f"no sources in {folders}"
    return files


def code(path):
    """Without comments and string literals, which may talk about anything."""
    text = re.sub(r"//.*|/\*[\s\S]*?\*/", "", path.read_text())
    return re.sub(r'(?<!include )"(\\.|[^"\\\n])*"', '""', text)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def found(pattern, files):
    return [str(p.relative_to(ROOT)) for p in files if re.search(pattern, code(p))]


def test_rounding_is_written_once():
    rounds = r"\b(ll?rint|rint|nearbyint|ll?round|round|roundeven|__float2int_r\w)f?\b|_round_p[sd]"
    assert found(rounds, sources("csrc", "cuda")) == ["csrc/include/asymq/quant_math.h"]


def test_the_mathematics_knows_no_torch():
    for header in ("quant_math.h", "parameterization.h", "live_range.h"):
        names = includes(ROOT / "csrc/include/asymq" / header)
        assert not [n for n in names if re.match(r"torch/|ATen/|c10/", n)], header


def test_cuda_kernels_know_no_torch():
    for path in sources("cuda/kernels"):
        names = includes(path)
        assert not [n for n in names if re.match(r"torch/|ATen/|c10/|ops/", n)], path.name


def test_cuda_needs_no_headers_but_those_of_its_runtime():
    """ATen/cuda's include those of cuBLAS, cuSPARSE and cuSOLVER: packages of their own."""
    needing = [p.name for p in sources("cuda") if any("ATen/cuda" in n for n in includes(p))]
    assert needing == []


def test_device_code_is_in_kernels():
    outside = [p for p in sources("cuda") if p.parent.name != "kernels"]
    assert not [p.name for p in outside if p.suffix in (".cu", ".cuh")]


def test_types_are_listed_once():
    """Kernels are instantiated by the lists of types.h."""
    by_hand = r"(Pointers|Operands)<(float|double|__)|ASYMQ_INSTANTIATE\w*\((float|double|__)"
    assert found(by_hand, sources("cuda")) == []


def test_a_quantizer_is_spelled_out_once():
    """Everything but flat.h, which makes and reads the dispatcher's list, hands it on whole."""
    files = [p for p in sources("csrc", "cuda") if p.suffix in (".h", ".cpp")]
    pieces = r"TensorList \w*ranges,\s+int64_t \w*parameterization,\s+int64_t \w*bits"
    assert found(pieces, files) == ["csrc/ops/flat.h"]


# What a folder of csrc may include of the others, besides include/.
STOREYS = {
    "include": set(),
    "ops": {"ops"},
    "cpu": {"cpu", "ops"},
    "meta": {"ops"},
    "composite": {"composite", "ops"},
    "autograd": {"autograd", "ops"},
    "nn": {"ops"},
}


def test_storeys_of_csrc():
    folders = {p.relative_to(ROOT / "csrc").parts[0] for p in sources("csrc")}
    assert folders == set(STOREYS)
    for folder, allowed in STOREYS.items():
        for path in sources(f"csrc/{folder}"):
            used = {n.split("/")[0] for n in includes(path)} & folders
            assert used <= allowed, f"{path.name} includes from {used - allowed}"


def test_nothing_waits_for_the_device():
    waits = r"\.item\s*(<|\()|cudaDeviceSynchronize|cudaStreamSynchronize|cudaMemcpy\b|\.cpu\(\)"
    assert found(waits, sources("csrc", "cuda")) == []


def test_sums_need_no_float_atomics():
    counts = "cuda/kernels/update_codes.cu"  # integers, of which any order has the same sum
    assert found(r"\batomicAdd\b|\bred\.", sources("cuda")) == [counts]
    text = code(ROOT / counts)
    assert re.findall(r"atomicAdd\(.*?\);", text) == [
        "atomicAdd(total, static_cast<Count>(changed));"
    ]
    assert "using Count = unsigned long long;" in text


def test_dependencies_point_one_way():
    """csrc knows nothing of cuda, and cuda of csrc what kernels and their callers share."""
    own = {str(p.relative_to(ROOT / "cuda")) for p in sources("cuda")}
    for path in sources("csrc"):
        assert not own & set(includes(path)), path.name
    public = {str(p.relative_to(ROOT / "csrc/include")) for p in sources("csrc/include")}
    ops = {str(p.relative_to(ROOT / "csrc")) for p in sources("csrc/ops")}
    outside = re.compile(r"(torch|ATen|c10)/|cuda\w*\.h$|\w+$")
    for path in sources("cuda"):
        for name in includes(path):
            assert name in own | public | ops or outside.match(name), f"{path.name}: {name}"


def test_public_headers_include_no_private_ones():
    private = {p.relative_to(ROOT / "csrc").parts[0] for p in sources("csrc")} - {"include"}
    for path in sources("csrc/include"):
        for name in includes(path):
            assert name.split("/")[0] not in private, f"{path.name} includes {name}"


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150


def test_reference_needs_torch_alone():
    names = re.findall(
        r"^(?:from|import) (\w+)", (ROOT / "python/asymq/reference.py").read_text(), re.M
    )
    assert set(names) <= {"__future__", "collections", "typing", "torch"}
