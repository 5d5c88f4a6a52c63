"""Lists that are written in two places are equal, and forms are what their readers expect."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]


def text(name):
    return (ROOT / name).read_text()


def parsed(name):
    return yaml.safe_load(text(name))


def test_pre_commit_runs_the_commands_of_the_test_script():
    script = text("scripts/test.sh")
    lint = re.search(r"^lint\(\) \{\n(.*?)^\}", script, re.MULTILINE | re.DOTALL).group(1)
    lines = [line.strip().removesuffix("|").strip() for line in lint.splitlines()]
    commands = [line.removeprefix("xargs ") for line in lines if not line.startswith("find ")]
    commands += re.findall(r'^step "Types" (.+)$', script, re.MULTILINE)
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == commands


def test_pre_commit_formats_the_files_of_the_test_script():
    """The folders and suffixes of `find` in one, of `files` in the other."""
    find = re.search(r"find (.+?) \|$", text("scripts/test.sh"), re.MULTILINE).group(1)
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    (files,) = (hook["files"] for hook in repository["hooks"] if hook["id"] == "clang-format")
    suffixes = set(re.findall(r"\*(\.\w+)", find))
    folders = find.split(" -name")[0].split()
    sources = [p for folder in ("csrc", "cuda", "tests") for p in (ROOT / folder).rglob("*.*")]
    for path in (p.relative_to(ROOT).as_posix() for p in sources if p.is_file()):
        found = path.startswith(tuple(f"{f}/" for f in folders)) and Path(path).suffix in suffixes
        assert found == bool(re.search(files, path)), path


def test_one_range_of_torch_versions():
    (torch,) = re.findall(r'"(torch>=[^"]+)"', text("pyproject.toml"))
    assert f'torch="{torch}"' in text("scripts/setup.sh")
    oldest, above = re.fullmatch(r"torch>=(\d+\.\d+),<(\d+\.\d+)", torch).groups()
    major, minor = above.split(".")
    tested = [
        entry["torch"]
        for entry in parsed(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"][
            "include"
        ]
    ]
    assert [t.rsplit(".", 1)[0] for t in tested] == [oldest, f"{major}.{int(minor) - 1}"]


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms(form):
    content = parsed(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert content["name"] and content["description"]
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in content["body"])


def test_the_bug_form_asks_for_the_versions():
    assert "python -m asymq --info" in text(".github/ISSUE_TEMPLATE/bug.yml")
