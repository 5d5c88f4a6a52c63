"""The site builds without a warning, and its API pages have every public name."""

import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import asymq

pytest.importorskip("furo")
pytest.importorskip("myst_parser")
pytest.importorskip("sphinx")

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "--fail-on-warning", "--keep-going"]
    command += ["-c", ROOT / "python" / "docs", "-d", folder / "doctrees", ROOT, folder / "html"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "html"


def test_the_first_page_is_found(site):
    target = (site / "index.html").read_text().split("url=")[1].split('"')[0]
    assert "<title>asymq</title>" in (site / target).read_text()


def test_every_public_name_is_documented(site):
    *_, objects = (site / "objects.inv").read_bytes().split(b"\n", 4)  # after four lines of header
    lines = zlib.decompress(objects).decode().splitlines()
    documented = {line.split()[0] for line in lines if line.split()[1].startswith("py:")}
    public = {f"asymq.{name}" for name in asymq.__all__ if name != "__version__"}
    assert public <= documented
