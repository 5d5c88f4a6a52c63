"""Runs an ONNX file in onnxruntime, in a process that has neither asymq nor torch.

onnx_session.py MODEL INPUTS.npz OUTPUTS.npz LEVEL [KEY=VALUE ...]

LEVEL: "DISABLE_ALL" or "ENABLE_ALL"; then entries of the session's configuration. Arrays of inputs
are called CASE:NAME; outputs by their case, of each model the first output.
"""

import subprocess
import sys

import numpy as np

# What keeps onnxruntime from multiplying weights of 4 bits with 8-bit activations.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


def outputs(path, cases, level="DISABLE_ALL", config=EXACT):
    """Output of the model for each case of {name: {input: tensor}}, by name, as tensors."""
    import torch

    given, made = (path.with_suffix(f".{which}.npz") for which in ("inputs", "outputs"))
    np.savez(
        given, **{f"{c}:{k}": v.numpy() for c, feeds in cases.items() for k, v in feeds.items()}
    )
    entries = [f"{key}={value}" for key, value in config.items()]
    command = [sys.executable, "-I", __file__, path, given, made, level, *entries]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    with np.load(made) as arrays:
        return {case: torch.from_numpy(arrays[case]) for case in cases}


def _main(path, given, made, level, *entries):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.intra_op_num_threads = 1
    for entry in entries:
        options.add_session_config_entry(*entry.split("="))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    cases = {}
    with np.load(given) as arrays:
        for key in arrays:
            case, name = key.split(":")
            cases.setdefault(case, {})[name] = arrays[key]
    np.savez(made, **{case: session.run(None, feeds)[0] for case, feeds in cases.items()})
    assert not {"asymq", "torch"} & set(sys.modules)


if __name__ == "__main__":
    _main(*sys.argv[1:])
