"""The recorded problem, shared by the tests that replay trajectories of the reference systems."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

FOLDER = pathlib.Path(__file__).parent
SHAPES = {"dense/kernel": (4, 3), "dense/bias": (3,), "scale": ()}

# What the replays were seen to need, over 20 steps, is 1.3e-6; these bounds come with the records.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


def load(name):
    return json.loads((FOLDER / name).read_text())


PROBLEM = load("contrib.json")["problem"]


def initial_params():
    given = PROBLEM["initial_params"]
    dense = {k: jnp.float32(given[f"dense/{k}"]) for k in ("kernel", "bias")}
    return {"dense": dense, "scale": jnp.float32(given["scale"])}


def batches():
    """Return inputs (20, 8, 4) and targets (20, 8, 3)."""
    order = [t % 4 for t in range(PROBLEM["steps"])]
    x = np.array(PROBLEM["inputs"], np.float32)[order]
    y = np.array(PROBLEM["targets"], np.float32)[order]
    y[PROBLEM["spike_step"]] *= np.float32(PROBLEM["spike_factor"])
    return x, y


def loss(params, x, y):
    pred = params["scale"] * jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    return jnp.mean((pred - y) ** 2)


def flat(params):
    """Return the parameters as the records lay them out: kernel, bias, scale."""
    parts = [params["dense"]["kernel"], params["dense"]["bias"], params["scale"]]
    return np.concatenate([np.ravel(part) for part in parts])
