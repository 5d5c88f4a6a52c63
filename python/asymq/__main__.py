"""``python -m asymq --info``, ``--cmake-prefix-path`` and ``export``."""

import argparse
import inspect
import platform
import sys
from typing import Any

import torch
from torch import nn

import asymq
from asymq import _build, _library


def info() -> str:
    rows = {
        "asymq": asymq.__version__,
        "operators": f"{asymq.implementation()} ({_library.why()})",
        "torch": f"{torch.__version__} (built for {_build.TORCH_VERSION or 'any'})",
        "python": platform.python_version(),
        "compiler": _build.COMPILER or "none",
        "CUDA": _build.CUDA_VERSION if _build.CUDA_ARCHITECTURES else "no",
        "CUDA architectures": _build.CUDA_ARCHITECTURES.replace(";", ", ") or "none",
        "CUDA device": (
            torch.cuda.get_device_name() if torch.cuda.is_available() else "none available"
        ),
        "library": _library.LIBRARY if _library.LIBRARY.exists() else "none",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def example_inputs(model: nn.Module, length: int) -> dict[str, torch.Tensor]:
    """Two rows of tokens for a language model."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"a {type(model).__name__} takes no input_ids: call asymq.load and the function with "
            "inputs of your own"
        )
    config: Any = model.config
    ids = torch.arange(2 * length).view(2, length) % config.get_text_config().vocab_size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def export(arguments: argparse.Namespace) -> str:
    """What was written. ValueError, in its first argument: options that are another format's."""
    options = {
        name: value
        for name in ("version", "widen", "tables", "activations")
        if (value := getattr(arguments, name)) is not None
    }
    belong = {"encodings": {"version", "widen", "tables"}, "compressed-tensors": {"activations"}}
    strange = options.keys() - belong.get(arguments.format, set())
    if strange:
        flags = ", ".join(f"--{name}" for name in sorted(strange))
        raise ValueError(f"{flags} does not belong to --format {arguments.format}")
    model = asymq.load(arguments.saved)
    if arguments.format == "compressed-tensors":
        return str(asymq.export_checkpoint(model, arguments.out, **options))
    function = asymq.export_onnx if arguments.format == "onnx" else asymq.export_encodings
    return str(function(model, example_inputs(model, arguments.length), arguments.out, **options))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asymq", description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--info", action="store_true", help="print versions and how it was built")
    action.add_argument(
        "--cmake-prefix-path",
        action="store_true",
        help="print the folder to add to CMAKE_PREFIX_PATH for find_package(asymq)",
    )
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("export", help="write a saved model as others read it")
    command.add_argument("saved", help="a folder of asymq.save")
    command.add_argument("out", help="the file, of compressed-tensors the folder")
    formats = ("onnx", "encodings", "compressed-tensors")
    command.add_argument("--format", required=True, choices=formats)
    command.add_argument(
        "--length", type=int, default=32, help="tokens of the example (%(default)s)"
    )
    command.add_argument("--version", help="of the encodings: 2.0.0, 1.0.0 or 0.6.1")
    command.add_argument(
        "--widen", action="store_true", default=None, help="encodings of 9 to 15 bits become 16"
    )
    command.add_argument(
        "--tables", action="store_true", default=None, help="encodings of embedding tables, too"
    )
    command.add_argument("--activations", help="refuse, drop, dynamic or drop_factors")
    arguments = parser.parse_args()
    if arguments.command == "export":
        try:
            print(export(arguments))
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            sys.exit(f"{command.prog}: {' '.join(str(error).split())}")
    elif arguments.info:
        print(info())
    elif arguments.cmake_prefix_path:
        if not _library.LIBRARY.exists():
            sys.exit(f"{parser.prog}: this asymq was built without its C++ library")
        print(_library.PACKAGE / "share" / "cmake")
    else:
        parser.error("needs --info, --cmake-prefix-path or export")


if __name__ == "__main__":
    main()
