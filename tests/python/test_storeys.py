"""The storeys of the Python package: a file imports from its own storey and those below, and
nothing goes in circles."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "asymq"

# From the ground up: files and folders of the package.
STOREYS = [
    {"_arguments", "_build", "_library", "_moved", "composite", "ops", "reference", "wrappers"},
    {"quantizers"},
    {"layers"},
    {"training"},
    {"config", "description", "models"},
    {"preparation", "calibration", "conversion", "checkpoint", "summary", "seeing"},
    {"export"},
    {"integrations", "scaling_law"},
    {"__init__"},
    {"__main__", "experiments"},
]
LEVELS = {name: level for level, names in enumerate(STOREYS) for name in names}
# The build writes _build.py.
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_build.py"]


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path):
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                submodule = inner in MODULES or alias.name == "_build"
                found.add(inner if submodule else node.module)
        else:
            assert not getattr(node, "level", 0), f"{path}: relative import"
    return {name for name in found if name.split(".")[0] == "asymq" and name in MODULES}


def storey(module):
    name = module.split(".")[1] if "." in module else "__init__"
    assert name in LEVELS, f"{module} belongs to no storey"
    return LEVELS[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_storey_imports_from_those_below(path):
    own = storey(module_of(path))
    for name in imports(path):
        # The package itself: its public names, which all storeys below the roof make up.
        limit = LEVELS["__main__"] if name == "asymq" else own
        assert storey(name) <= own or own >= limit, f"{module_of(path)} imports {name}"


def test_no_file_imports_itself_through_others():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for name in sorted(graph[module]):
                visit(name)
            path.pop()
            done.add(module)

    for module in graph:
        visit(module)


def test_nobody_asks_which_granularity_it_is():
    for path in FILES:
        text, own = path.read_text(), module_of(path)
        if own != "asymq.quantizers.granularity":
            assert not re.search(r"isinstance\([^)]*Per(Tensor|Channel|Group)", text), own
        if not own.startswith(("asymq.quantizers", "asymq.experiments")):
            assert "spec.dynamic" not in text, own
