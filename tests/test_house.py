"""Holds the order of imports that docs/design.md and README.md state, and sizes of files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "transfusion_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
LONGEST_FUNCTION = 60
LONGEST_FILE = 350


def stated_order(document: str) -> list[str]:
    """Names in the first column of the table under "The tree", from top to bottom."""
    section = (ROOT / document).read_text().split("## The tree")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [
        name.removesuffix(".py").rstrip("/")
        for cell in cells
        for name in re.findall(r"`(?:transfusion_jax/)?([^`]+)`", cell)
    ]


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, inside functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return found


def part(module: str) -> str:
    """The file or folder right under the package that a module is in."""
    return (module.split(".") + [""])[1]


def test_imports_point_downward_in_the_stated_order():
    order = stated_order("docs/design.md")
    parts = {part(module) for module in MODULES} - {"", "__main__"}
    assert sorted(order) == sorted(parts)
    upward = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if part(module) in order
        for other in imported(path)
        if part(other) in order and order.index(part(other)) < order.index(part(module))
    ]
    assert not upward


def test_the_readme_states_the_same_order():
    design = stated_order("docs/design.md")
    readme = stated_order("README.md")
    assert [name for name in design if name in readme] == readme
    assert {name for name in design if (PACKAGE / name).is_dir()} <= set(readme)


def test_no_files_import_each_other_in_a_circle():
    graph = {module: imported(path) - {module} for module, path in MODULES.items()}
    while leaves := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph  # what is left imports itself, by way of others


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_files_and_functions_are_short(path: Path):
    text = path.read_text()
    functions = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert len(text.splitlines()) <= LONGEST_FILE
    assert not functions


def test_package_files_hold_no_code():
    """But for the facade of the configuration, which is what experiment files import."""
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text()).body[1:]
            public = (
                (ast.Assign, ast.ImportFrom) if module == "transfusion_jax.config" else ast.Assign
            )
            assert all(isinstance(node, public) for node in body), path
            assert module in ("transfusion_jax", "transfusion_jax.config") or not body, path


def test_every_letter_of_an_array_name_is_in_the_legend():
    legend = (PACKAGE / "shapes.py").read_text().split('"""')[1]
    letters = set("".join(re.findall(r"(?:^|  )((?:[A-Za-z] )+) ", legend, re.MULTILINE)))
    names = {
        node.id if isinstance(node, ast.Name) else node.arg
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name | ast.arg)
    }
    arrays = {name: re.fullmatch(r"[a-z][a-z_0-9]*_([A-Z][A-Za-z1]*)", name) for name in names}
    unknown = {name for name, match in arrays.items() if match and set(match[1]) - letters - {"1"}}
    assert not unknown
