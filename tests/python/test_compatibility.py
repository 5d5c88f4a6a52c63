"""What version 0.1 wrote, and the names it had: later versions read both."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from compare import assert_bit_equal
from tiny_models import transformers

import asymq

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0.1"


@pytest.fixture(scope="module")
def expected():
    return torch.load(FIXTURES / "expected.pt")


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_a_folder_of_version_0_1(expected):
    model = asymq.load(FIXTURES / "folder")
    torch.testing.assert_close(
        logits(model, expected["ids"]), expected["logits"], rtol=1e-5, atol=1e-5
    )


def test_a_state_of_version_0_1(expected):
    loaded = asymq.load(FIXTURES / "folder")
    model = transformers.GPT2LMHeadModel(loaded.config)
    asymq.prepare(model, asymq.QuantConfig.table2("min_max"))
    state = torch.load(FIXTURES / "state.pt")
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state)
    assert_bit_equal(logits(model.eval(), expected["ids"]), logits(loaded, expected["ids"]))


def test_a_pickle_of_version_0_1_says_what_opens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"made by asymq 0\.1.*asymq\.load"):
            torch.load(FIXTURES / "model.pt", weights_only=False)


NAMES = {
    "asymq.modules": ("QuantLinear", "QuantLayer", "WEIGHT", "unquantized"),
    "asymq.quantizer": ("QuantAct", "WeightQuantizer", "named_quantizers", "QUANTIZING"),
    "asymq.specs": ("QuantSpec", "QuantConfig", "PerGroup", "PARAMETERIZATIONS"),
    "asymq.attention": ("NAME", "quantized_attention"),
    "asymq.loss": ("causal_lm_loss",),
}


@pytest.mark.parametrize("module", NAMES)
def test_old_modules_import_with_a_warning(module):
    sys.modules.pop(module, None)
    with pytest.warns(DeprecationWarning, match=f"{module} is now asymq") as found:
        names = importlib.import_module(module)
    assert len(found) == 1
    for name in NAMES[module]:
        assert hasattr(names, name), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module(module)  # once


def test_modules_that_kept_their_names():
    from asymq.calibration import calibrate
    from asymq.checkpoint import load, save
    from asymq.preparation import prepare
    from asymq.training import attach_step_rule, freeze_weights, range_parameters

    assert calibrate is asymq.calibrate and (save, load) == (asymq.save, asymq.load)
    assert prepare is asymq.prepare and range_parameters is asymq.range_parameters
    assert freeze_weights is asymq.freeze_weights and attach_step_rule is asymq.attach_step_rule


def test_what_import_asymq_brings():
    """The reference when it is asked for; neither transformers nor exports nor torch's compiler."""
    code = (
        "import sys, asymq\n"
        "assert not {'asymq.reference', 'asymq.export'} & sys.modules.keys()\n"
        "asymq.reference.fake_quantize_min_max\n"
        "assert not {'transformers', 'torch._dynamo'} & sys.modules.keys()\n"
        "for name in asymq.__all__:\n"
        "    assert name == 'QuantConv1D' or getattr(asymq, name) is not None, name\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
