"""The package's shape: imports point one way, extras wait until they are needed."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

import optimize_loss as ol

PACKAGE = pathlib.Path(ol.__file__).parent
FLOORS = {
    "_checks": 1,
    "_random": 1,
    "_transfers": 1,
    "_equal": 1,
    "_figure": 1,
    "_interrupted": 1,
    "_names": 2,
    "schedules": 2,
    "_whole_file": 2,
    "_keras_parts": 5,
    "_model_state": 3,
    "_trainable": 3,
    "transforms": 3,
    "_safetensors": 3,
    "_renaming": 4,
    "_loss": 4,
    "_metrics": 4,
    "_options": 4,
    "_around": 4,
    "_state": 4,
    "optimizers": 4,
    "tensorboard": 4,
    "_ratios": 4,
    "plot": 5,
    "_found": 6,
    "_ramp": 6,
    "_grid": 5,
    "_skips": 5,
    "_steepest": 5,
    "_named_state": 5,
    "_state_dict": 6,
    "_batches": 5,
    "_rules": 5,
    "_history": 5,
    "_signals": 5,
    "_search": 7,
    "_new_slots": 6,
    "_lint": 6,
    "_loop": 6,
    "_rule_links": 6,
    "_checkpoint": 7,
    "_explain": 7,
    "_checkpoints": 8,
    "_pure_step": 7,
    "_train_step": 8,
    "keras": 8,
    "_build": 9,
    "__init__": 10,
    "_photo": 11,
    "_painting": 12,
    "_picture": 13,
    "__main__": 14,
}
ROOT = PACKAGE.parent
EXTRAS = ("matplotlib", "PIL", "tqdm", "tensorboardX", "flax", "keras", "tensorboard")


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path):
    """Return the rooms of the package that a file imports when it is itself imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimize_loss"):
            inside = (node.module or "").split(".")[1:]
            names = [alias.name for alias in node.names]
            yield from inside[:1] or [n if n in FLOORS else "__init__" for n in names]
        elif isinstance(node, ast.Import):
            yield from ("__init__" for alias in node.names if alias.name == "optimize_loss")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_point_down(path):
    own = room(path)
    for other in set(imported_rooms(path)) - {own}:
        assert FLOORS[other] < FLOORS[own], f"{own} imports {other}"


def lines_of_code(text):
    """Return how many lines are neither empty nor of a comment or a docstring."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [n for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)]
    spans = [(n.body[0].lineno, n.body[0].end_lineno or 0) for n in nodes]
    docstrings = {i for first, last in spans for i in range(first, last + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(i not in docstrings and line.strip()[:1] not in ("", "#") for i, line in lines)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_a_file_is_one_idea(path):
    assert lines_of_code(path.read_text()) <= 250


def test_importing_the_package_imports_no_extra():
    code = f"import optimize_loss, sys; print([m for m in {EXTRAS} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", [ol, ol.transforms, ol.optimizers, ol.schedules])
def test_public_names_exist_and_are_documented(room):
    for name in room.__all__:
        assert getattr(room, name).__doc__, name


def test_the_lowest_versions_are_those_that_are_required():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = (ROOT / ".github" / "lowest.txt").read_text()
    pinned = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    for name, version in (x.split(">=") for x in required):
        assert f"{pinned.pop(name)}.".startswith(f"{version}.")
    assert not pinned
