"""docs/cluster.md: its table of launch.yaml's keys is the one that the keys' own lines make.

``python tests/test_cluster_page.py`` writes it anew.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pydantic import BaseModel

from launch.slurm import profile

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cluster.md"
BEGIN, END = "<!-- keys: tests/test_cluster_page.py writes this table -->", "<!-- end of keys -->"


def table() -> str:
    """A row for each key of launch.yaml: its name, its default, and the line below it in the source."""
    tree = ast.parse(Path(profile.__file__).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    rows = ["| key | default | |", "|---|---|---|"]
    for model, prefix in ((profile.Profile, ""), (profile.Container, "container.")):
        said = lines(classes[model.__name__])
        rows += [f"| `{prefix}{name}` | {shown(model, name)} | {said[name]} |" for name in model.model_fields]
    return "\n".join(rows)


def lines(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, line in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(line.value.value).split()).replace("|", "\\|")
    return found


def shown(model: type[BaseModel], name: str) -> str:
    """The default as YAML has it; empty for none."""
    field = model.model_fields[name]
    if field.is_required():
        return "must be said"
    if field.default in (None, (), {}):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def test_the_table_is_that_of_the_profile() -> None:
    page = PAGE.read_text(encoding="utf-8")
    written = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == table(), "python tests/test_cluster_page.py writes it anew"


def test_each_key_has_a_line() -> None:
    assert all(re.search(r"\| \S.* \|$", row) for row in table().splitlines()[2:])


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
