"""The package's shape gets no worse, and extras wait until they are needed.

`python -m tests.layout` prints the shape. Where a figure gets better, record it here.
"""

import pathlib
import subprocess
import sys
import tomllib

import pytest

import optimize_loss as ol
from tests import layout

RECORDED = {
    "files in the root": 10,
    "folders in the root": 10,
    "files": 141,
    "lines of code": 15113,
    "lines of code of the core": 9327,
    "lines of code of the longest file": 248,
    "import depth by file": 21,
    "import depth by room": 10,
    "files in circles": 0,
    "rooms in circles": 0,
    "imports that point up": 0,
    "private imports across rooms": 39,
    "functions of ten branches": 1,
    "members of Link": 21,
    "flags of Link": 6,
}
ROOT = pathlib.Path(__file__).parent.parent
EXTRAS = ("matplotlib", "PIL", "tqdm", "tensorboardX", "flax", "keras", "tensorboard")


def test_the_shape_gets_no_worse():
    now = layout.figures()
    print(layout.table(RECORDED, now))
    assert now.keys() == RECORDED.keys()
    worse = {name: value for name, value in now.items() if value > RECORDED[name]}
    assert not worse, layout.table(RECORDED, now)


def test_a_file_of_tests_has_one_theme():
    assert not layout.long_test_files(600)
    assert "tests/cases.py" in layout.long_test_files(100)


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert layout.circles(graph) == ["b", "c"]
    assert layout.depth(graph) == 4
    assert layout.depth({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == 3


def test_branches_are_counted():
    code = "def f(x):\n    return [y for y in x if y and not x] if x or 1 else None"
    assert layout.branches(layout.ast.parse(code)) == 6


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
