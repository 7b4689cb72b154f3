"""docs/design.md is true."""

import ast
import re

from conftest import ROOT


def test_every_file_has_its_row_and_imports_only_from_rows_below():
    table = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.MULTILINE)
    row_of = {name: number for number, cell in enumerate(table) for name in re.findall(r"`(\w+)\.py`", cell)}
    files = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")}
    assert files.keys() == row_of.keys()
    for name, tree in files.items():
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            upwards = [other for other in imported if row_of.get(other, len(table)) < row_of[name]]
            assert not upwards, f"{name}.py imports {upwards[0]}.py, which stands above it"
