"""An import of a library that asymq adds to goes on where asymq does not know its version."""

import subprocess
import sys

import pytest

BACKENDS = "aimet_torch.quantization.affine.backends"
QUANTIZER = "modelopt.torch.quantization.nn.modules.tensor_quantizer"
# Modules of other versions, and what asymq's import then meets.
STUBS = {
    "aimet_torch": (
        {
            "aimet_torch.experimental.pgs": "",
            f"{BACKENDS}.torch_builtins": "",
            BACKENDS: "def add_backend(name, module): pass",
        },
        "asymq.integrations.aimet is not available: AttributeError: ",
    ),
    "modelopt": (
        {
            QUANTIZER: "class TensorQuantizer: pass\n"
            "def register_quant_backend(name, *, entrypoint): pass"
        },
        "asymq.integrations.modelopt is not available: TypeError: ",
    ),
}


@pytest.mark.parametrize("first", ["asymq", "other"])
@pytest.mark.parametrize("library", STUBS)
def test_another_version(library, first, tmp_path):
    modules, expected = STUBS[library]
    for name, text in modules.items():
        *packages, _ = parts = name.split(".")
        for depth in range(1, len(packages) + 1):
            folder = tmp_path.joinpath(*parts[:depth])
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        path = tmp_path.joinpath(*parts)
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).write_text(text)
    names = ["asymq", *modules] if first == "asymq" else [*modules, "asymq"]
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {', '.join(names)}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"UserWarning: asymq: {expected}" in result.stderr
