"""``python -m asymq --info`` and ``--cmake-prefix-path``."""

import argparse
import platform

import torch

import asymq
from asymq import _build, _library


def info() -> str:
    rows = {
        "asymq": asymq.__version__,
        "torch": f"{torch.__version__} (built for {_build.TORCH_VERSION})",
        "python": platform.python_version(),
        "compiler": _build.COMPILER,
        "CUDA": _build.CUDA_VERSION if _build.CUDA_ARCHITECTURES else "no",
        "CUDA architectures": _build.CUDA_ARCHITECTURES.replace(";", ", ") or "none",
        "CUDA device": (
            torch.cuda.get_device_name() if torch.cuda.is_available() else "none available"
        ),
        "library": _library.LIBRARY,
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asymq", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--info", action="store_true", help="print versions and how it was built")
    action.add_argument(
        "--cmake-prefix-path",
        action="store_true",
        help="print the folder to add to CMAKE_PREFIX_PATH for find_package(asymq)",
    )
    arguments = parser.parse_args()
    print(info() if arguments.info else _library.PACKAGE / "share" / "cmake")


if __name__ == "__main__":
    main()
