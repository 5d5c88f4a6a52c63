"""Rules that keep the layout of the experiments: they share common, and import without circles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "asymq"
EXPERIMENTS = PACKAGE / "experiments"
# Figure 4 is drawn from the results of Table 2; transition rates steer its language models, the
# study trains them.
ALLOWED = {("figures", "table2"), ("transition_rate", "table2"), ("study", "table2")}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(EXPERIMENTS.rglob("*.py"))}


def imports(path):
    """The modules of the experiments that a file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & MODULES.keys()
            found |= modules or {node.module}
    return found & MODULES.keys()


ARROWS = {name: imports(path) for name, path in MODULES.items()}


def folder(name):
    parts = name.split(".")
    return parts[2] if len(parts) > 2 else None


def test_every_experiment_has_a_folder():
    assert [path.name for path in EXPERIMENTS.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("name", MODULES)
def test_experiments_import_common_and_themselves(name):
    for other in ARROWS[name]:
        pair = folder(name), folder(other)
        assert pair[1] in (pair[0], "common") or pair in ALLOWED, f"{name} imports {other}"


def test_no_circles():
    left = dict(ARROWS)
    while left:
        ends = [name for name, others in left.items() if not others & left.keys()]
        assert ends, f"a circle among {sorted(left)}"
        for name in ends:
            del left[name]


def test_the_package_does_not_know_its_experiments():
    for path in PACKAGE.rglob("*.py"):
        if EXPERIMENTS not in path.parents:
            assert not imports(path), path


@pytest.mark.parametrize("name", sorted({folder(name) for name in MODULES} - {None}))
def test_every_folder_has_a_sign(name):
    assert ast.get_docstring(ast.parse((EXPERIMENTS / name / "__init__.py").read_text()))
