"""Calls of one traced update, and how many come from another file: `python -m benchmarks.calls`.

Two parameters, clipping and Adam; beside optax. Only functions of the library itself count.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optimize_loss as ol

PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}


def counted(function: Callable[[], Any], package: str) -> tuple[int, int]:
    """Return how many functions of a package are called, and from how many other files of it."""
    found = [0, 0]

    def inside(frame: FrameType | None) -> bool:
        return frame is not None and f"/{package}/" in frame.f_code.co_filename

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not inside(frame):
            return
        caller = frame.f_back
        while caller is not None and not inside(caller):
            caller = caller.f_back
        found[0] += 1
        found[1] += caller is not None and caller.f_code.co_filename != frame.f_code.co_filename

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found[0], found[1]


def main() -> None:
    """Print the calls of ours and of optax's."""
    ours = ol.transforms.chain(
        clip=ol.transforms.ClipByGlobalNorm(1.0),
        adam=ol.transforms.ScaleByAdam(),
        rate=ol.transforms.ScaleByLearningRate(1e-3),
    )
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    for name, tx in (("optimize_loss", ours), ("optax", theirs)):
        state: Any = tx.init(PARAMS)
        lower = jax.jit(lambda g, s, tx=tx: tx.update(g, s, PARAMS)).lower
        calls, crossings = counted(lambda lower=lower, s=state: lower(PARAMS, s), name)
        print(f"{name:14} {calls:5} calls, {crossings:5} from another file")


if __name__ == "__main__":
    main()
