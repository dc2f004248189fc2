"""The code keeps to its floor plan: small rooms, imports that run one way, a word on each part."""

import ast
import graphlib
import re

import pytest

from small_runs import ROOT

ROOMS = sorted((ROOT / "common").glob("*.py"))
PRODUCTION = [ROOT / "dreamer.py", ROOT / "dreamer_utils.py", *ROOMS]


def imports(path):
    """The full names of all modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path):
    """The first words of what a file imports."""
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_a_room_has_no_more_than_260_lines(path):
    assert len(path.read_text().splitlines()) <= 260


def test_imports_run_one_way():
    """benchmarks, tests -> dreamer -> dreamer_utils -> common."""
    floors = "common", "dreamer_utils", "dreamer", "small_runs", "benchmarks", "tests"
    above = {path: set(floors[1:]) for path in ROOMS}
    above |= {ROOT / f"{floors[i]}.py": set(floors[i + 1 :]) for i in (1, 2)}
    wrong = {path.name: packages(path) & names for path, names in above.items()}
    assert {name: found for name, found in wrong.items() if found} == {}
    assert "dreamer_utils" in packages(ROOT / "dreamer.py")
    assert "common" in packages(ROOT / "dreamer_utils.py")


def test_there_is_no_circle_in_common():
    rooms = {f"common.{path.stem}" for path in ROOMS}
    graph = {f"common.{path.stem}": rooms & set(imports(path)) for path in ROOMS}
    assert sum(map(len, graph.values())) > 20
    graphlib.TopologicalSorter(graph).prepare()  # an error names the circle


def test_formatting_is_left_to_the_machine():
    paths = [*PRODUCTION, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    skipped = re.compile(r"#\s*fmt:\s*(skip|off)")
    assert [path.name for path in paths if skipped.search(path.read_text())] == []


def documentable(node, prefix=""):
    """(name, node) of the public functions and classes in a module, a class or a function.

    Functions in functions, and names that begin with an underscore, need no docstring.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            inner = isinstance(node, ast.FunctionDef) and isinstance(child, ast.FunctionDef)
            if not inner and not child.name.startswith("_"):
                yield prefix + child.name, child
            yield from documentable(child, f"{prefix}{child.name}.")
        elif not isinstance(child, ast.expr):
            yield from documentable(child, prefix)  # `with` and `if` at any level


def test_every_public_function_and_class_has_a_docstring():
    count, missing = 0, []
    for path in PRODUCTION:
        module = ast.parse(path.read_text())
        for name, node in [("the module", module), *documentable(module)]:
            count += 1
            if not ast.get_docstring(node):
                missing.append(f"{path.name}: {name}")
    assert count > 200
    assert missing == []
