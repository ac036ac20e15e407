"""Every notebook runs from its first cell to its last, warnings being errors."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    unset = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_are_labelled(path):
    """Of its axes that have a title, each says what is across and what is up."""
    calls = re.findall(r"\.set\((.*?)\)\n", path.read_text(), re.DOTALL)
    titled = [call for call in calls if "title=" in call]
    assert titled
    assert all("xlabel=" in call for call in titled)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_that_are_named_exist(path):
    named = re.findall(r"`([a-z_]+\.py)`", path.read_text())
    assert not [name for name in named if not path.with_name(name).exists()]
