"""`docs/inside.md` names what there is."""

import ast
import pathlib
import re

from tests.layout import PACKAGE, ROOT, trees

TEXT = (ROOT / "docs" / "inside.md").read_text()
NAMES = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))


def defined():
    """Return the names of all functions, methods, classes and constants of the package."""
    found = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.arg):
                found.add(node.arg)
    return found


def test_every_file_that_is_named_exists():
    files = [name for name in NAMES if name.endswith((".py", "/"))]
    assert len(files) > 20
    for name in files:
        places = [ROOT / name, PACKAGE / name, *PACKAGE.glob(f"*/{name}")]
        assert any(map(pathlib.Path.exists, places)), name


def test_every_room_is_on_the_map():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"_demo"} <= {name.rstrip("/") for name in NAMES}


def test_every_function_that_is_named_exists():
    known = defined()
    names = [name for name in NAMES if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", name)]
    names = [name for name in names if not name.endswith(".py")]
    assert len(names) > 30
    outside = {"lax.cond", "vmap", "state.set", "state.params", "python"}
    for name in names:
        *_, last = name.split("(")[0].split(".")
        assert last in known or name.split("(")[0] in outside, name
