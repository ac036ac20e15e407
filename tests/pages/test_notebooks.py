"""Every notebook runs from its first cell to its last, warnings being errors."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 6


# Runs a notebook with every figure that is made kept, then looks at the labels of its axes.
LABELLED = """
import runpy, sys
from matplotlib.figure import Figure

figures, made = [], Figure.__init__
def keep(self, *args, **kwargs):
    made(self, *args, **kwargs)
    figures.append(self)
Figure.__init__ = keep
runpy.run_path(sys.argv[1], run_name="__main__")
every = [axes for figure in figures for axes in figure.axes if axes.get_visible()]
plots = [axes for axes in every if axes.get_label() != "<colorbar>"]
assert plots, "no picture"
for axes in plots:
    assert axes.get_xlabel() and axes.get_ylabel(), (axes.get_title(), axes.get_xlabel())
for axes in set(every) - set(plots):
    assert axes.get_xlabel() or axes.get_ylabel(), "a bar of colours"
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_pictures_are_labelled(path, tmp_path):
    unset = ("JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", LABELLED, str(path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_that_are_named_exist(path):
    named = re.findall(r"`([a-z_]+\.py)`", path.read_text())
    assert not [name for name in named if not path.with_name(name).exists()]
