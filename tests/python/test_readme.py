"""Every fenced block of every README and of the pages in python/docs runs, and every relative link
leads to a file.

A block is a program of its own, in a process and a folder of its own. A comment right before its
fence says otherwise:

    <!-- not run: REASON -->     with one of REASONS
    <!-- needs PACKAGE -->       skipped without it; one of PACKAGES, which test.sh lacks
    <!-- continues -->           appended to the block of the same language before it

The C++ blocks are built as one CMake project, by the cmake block and the bash block that calls
CMake. A document with a cmake block of its own is a project of its own.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (".github", "csrc", "cuda", "python", "scripts", "tests")
REASONS = {
    "installs packages",
    "needs a file of runs",
    "needs several GPUs",
    "needs the hub",
    "not a program",
    "runs the tests",
    "takes minutes",
}
# Run with `PYTHONPATH=python PYTHON -m pytest` by an interpreter that has them.
PACKAGES = {"aimet_torch", "modelopt"}
FENCE = re.compile(r"(?:^<!-- (.+) -->\n)?^```(.*)\n((?s:.*?))^```$", re.MULTILINE)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str
    mark: str | None

    def __str__(self):
        return f"{self.document}:{self.line}"

    @property
    def runs(self):
        return not (self.mark or "").startswith("not run")

    @property
    def needs(self):
        return (self.mark or "").partition("needs ")[2]


def documents():
    files = [*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))]
    pages = (ROOT / "python" / "docs").glob("*.md")
    return sorted({p for p in files if p.stem in ("README", "CONTRIBUTING")} | set(pages))


def blocks_of(path):
    text = path.read_text()
    return [
        Block(
            path.relative_to(ROOT).as_posix(),
            text.count("\n", 0, match.start(2)) + 1,
            match.group(2),
            match.group(3),
            match.group(1),
        )
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for path in documents() for block in blocks_of(path)]


def programs(language):
    """Lists of blocks: one that runs, and those that continue it."""
    result = []
    for block in (b for b in BLOCKS if b.language == language and b.runs):
        if block.mark == "continues":
            assert result and result[-1][0].document == block.document, f"{block} continues nothing"
            result[-1].append(block)
        else:
            result.append([block])
    return result


def builds(program):
    return any(re.search(r"^cmake ", block.text, re.MULTILINE) for block in program)


def shell_programs():
    return [program for program in programs("bash") if not builds(program)]


def source(program):
    return "\n".join(block.text for block in program)


def run(*command, cwd):
    """What the command prints. Fails on an error, on a warning, and if a printed loss does not
    fall."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert not re.search("warning|deprecated|unrecognized", output, re.IGNORECASE), output
    losses = [float(x) for x in re.findall(r"\bloss +([-+.\w]+)", result.stdout)]
    assert not losses or losses[-1] < losses[0], output
    return output


def link_checkout(folder):
    """The checkout as seen from its root; what a program writes stays in the folder."""
    for path in ROOT.iterdir():
        if path.name not in ("build", ".git"):
            (folder / path.name).symlink_to(path)


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documents_are_found():
    names = {block.document for block in BLOCKS}
    assert {"README.md", ".github/CONTRIBUTING.md", "python/docs/index.md"} <= names


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_fences_are_parsed(path):
    """None is indented or left open, and every comment is right before one."""
    text = path.read_text()
    assert len(re.findall(r"```|~~~", text)) == 2 * len(blocks_of(path))
    marks = [block.mark for block in blocks_of(path) if block.mark]
    assert re.findall(r"<!-- (.+) -->", text) == marks


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_marks_have_a_reason(block):
    allowed = {"continues", *(f"not run: {reason}" for reason in REASONS)}
    allowed |= {f"needs {package}" for package in PACKAGES}
    assert block.mark is None or block.mark in allowed


@pytest.mark.parametrize("program", programs("python"), ids=lambda p: str(p[0]))
def test_python(program, tmp_path):
    package = program[0].needs
    if package and not find_spec(package):
        pytest.skip(f"{package} is not installed")
    (tmp_path / "example.py").write_text(source(program))
    # What such a package warns of is not what the document says.
    options = ["-W", "ignore"] if package else []
    run(sys.executable, *options, "example.py", cwd=tmp_path)


@pytest.mark.parametrize("program", shell_programs(), ids=lambda p: str(p[0]))
def test_bash(program, tmp_path):
    link_checkout(tmp_path)
    run("bash", "-euo", "pipefail", "-c", source(program), cwd=tmp_path)


def projects():
    """By document with a cmake block: that block, the bash block that builds it, the C++ programs.
    Programs of documents without one belong to the first README."""
    cmake = {program[0].document: program for program in programs("cmake")}
    build = {program[0].document: program for program in programs("bash") if builds(program)}
    cpp = {document: [] for document in cmake}
    for program in programs("cpp"):
        cpp.get(program[0].document, cpp["README.md"]).append(program)
    # The first README's own program comes first: main.cpp.
    cpp["README.md"].sort(key=lambda program: program[0].document != "README.md")
    return {d: (cmake[d], build.get(d, build["README.md"]), cpp[d]) for d in cmake}


@pytest.mark.parametrize("document", projects())
def test_cpp(document, tmp_path):
    """One project: the cmake block is for the document's first program, the others join it."""
    cmake, build, (first, *others) = projects()[document]
    project = source(cmake)
    (tmp_path / "main.cpp").write_text(source(first))
    for number, program in enumerate(others):
        (tmp_path / f"other{number}.cpp").write_text(source(program))
        project += f"add_executable(other{number} other{number}.cpp)\n"
        project += f"target_link_libraries(other{number} PRIVATE asymq::asymq)\n"
    (tmp_path / "CMakeLists.txt").write_text(project)
    run("bash", "-euo", "pipefail", "-c", source(build), cwd=tmp_path)
    for number, _ in enumerate(others):
        run(tmp_path / "build" / f"other{number}", cwd=tmp_path)


def test_every_block_runs_or_says_why_not():
    """Each unmarked block is in a program of one of the three tests above."""
    ran = [*programs("python"), *shell_programs()]
    for cmake, build, cpp in projects().values():
        ran += [cmake, build, *cpp]
    unmarked = {str(block) for block in BLOCKS if block.runs}
    assert unmarked == {str(block) for program in ran for block in program}


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(path):
    text = re.sub(FENCE, "", path.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            target, _, anchor = link.partition("#")
            file = path.parent / target if target else path
            assert file.exists(), link
            if anchor:
                assert anchor in anchors(file), link
