"""Where and with what results were made."""

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import asymq
from asymq.experiments.common.words import count


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {count(torch.get_num_threads(), 'thread')}"


def header(device: str, setting: str) -> list[str]:
    """Machine, versions, date and setting, as every file of results begins."""
    versions = (
        f"asymq {asymq.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    if device == "cuda":
        versions += f", CUDA {torch.version.cuda}"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return [machine(device), versions, f"{date}, {setting}"]


def provenance(device: torch.device) -> dict:
    """Machine, versions and git commit (None outside of a checkout) of a result."""
    versions: dict[str, str | None] = {"asymq": asymq.__version__, "torch": torch.__version__}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    try:
        versions["transformers"] = version("transformers")
    except PackageNotFoundError:
        pass
    return {"machine": machine(device.type), "versions": versions, "commit": _commit()}


def _commit() -> str | None:
    describe = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        result = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
