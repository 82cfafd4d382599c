"""The house rules that no linter knows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "upslope").rglob("*.py"))
BENCHMARKS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "results").rglob("*.py")])


@pytest.mark.parametrize("path", FILES + BENCHMARKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert len(source.splitlines()) < 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno} lines"


@pytest.mark.parametrize("path", FILES + BENCHMARKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stand_at_the_top(path):
    if path.name in ("cli.py",) or path == ROOT / "upslope" / "__init__.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{node.name} imports inside"


def test_every_public_function_says_what_it_does():
    silent = []
    for path in FILES + BENCHMARKS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{path.name}:{node.name}")
    assert silent == ["tables.py:Table"]


def test_the_file_map_of_the_readme_is_whole():
    readme = (ROOT / "README.md").read_text()
    for path in FILES:
        if path.name != "__init__.py":
            assert path.name in readme, f"{path.relative_to(ROOT)} is not in the README's file map"


def test_both_readmes_have_the_same_figures():
    def tables(name):
        text = (ROOT / name).read_text()
        return [re.findall(r"\d+(?:\.\d+)?", line) for line in text.splitlines() if line.startswith("|")]

    assert tables("README.md") == tables("README.zh.md")
