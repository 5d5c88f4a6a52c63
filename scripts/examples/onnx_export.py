"""A quantized model as ONNX, run by onnxruntime, and how far its logits are from asymq's.

    onnx_export.py --model quantized --out model.onnx

quantized: a folder of asymq.save, with ranges of the tensor (not of each token).
"""

import argparse
import json

import onnx
import onnxruntime
import torch

import asymq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder of asymq.save")
parser.add_argument("--out", required=True, help="ONNX file to write")
parser.add_argument("--length", type=int, default=32, help="tokens of the example")
args = parser.parse_args()

model = asymq.load(args.model).eval()
example = torch.randint(model.config.vocab_size, (2, args.length))
print(asymq.export_onnx(model, {"input_ids": example}, args.out))

# The settings that keep onnxruntime from rounding again stand in the file.
metadata = {p.key: p.value for p in onnx.load(args.out, load_external_data=False).metadata_props}
options = onnxruntime.SessionOptions()
for key, value in json.loads(metadata["asymq.session_config"]).items():
    options.add_session_config_entry(key, value)
session = onnxruntime.InferenceSession(args.out, options, providers=["CPUExecutionProvider"])
ids = torch.randint(model.config.vocab_size, (3, args.length + 5))  # other shapes than the example
(logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
with torch.no_grad():
    expected = model(input_ids=ids).logits
difference = (torch.from_numpy(logits) - expected).abs()
equal = (difference == 0).float().mean()
print(f"equal logits {equal:.2%}, largest difference {difference.max():.2g}")
