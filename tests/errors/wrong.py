"""What is done wrong, and how it is checked that an error says so."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss

# Untyped, since what these tests pass is wrong on purpose.
ol: Any = optimize_loss
T: Any = optimize_loss.transforms
PARAMS = {"dense": {"bias": np.ones(3, np.float32), "kernel": np.ones((2, 3), np.float32)}}
W = {"w": np.float32(10)}


def loss(params, x):
    return jnp.abs(params["w"] * x)


def build(function: Any = loss, **options: Any) -> Any:
    return ol.optimize_loss(function, **{"learning_rate": 0.1, "optimizer": "SGD", **options})


def init(params: Any = None, function: Any = loss, **options: Any) -> Any:
    return build(function, **options).init(W if params is None else params)


def run(function: Any = loss, *batch: Any, params: Any = None, **options: Any) -> Any:
    step = build(function, **options)
    return step(step.init(W if params is None else params), *(batch or (5.0,)))


def update(grads: Any, params: Any = PARAMS, **links: Any) -> Any:
    tx = T.chain(**(links or {"clip": T.ClipByGlobalNorm(1.0), "adam": T.ScaleByAdam()}))
    return tx.update(grads, tx.init(params), params)


def set_number(**values: Any) -> None:
    init(clip_gradients=1.0).set(**values)


VALUE, KIND, TREE, RUN = ValueError, ol.InvalidType, ol.TreeMismatch, RuntimeError


class Row(NamedTuple):
    """What is done, the exact class of the error, and what its message must contain."""

    bad: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


def check(row: Row) -> None:
    """Do what is wrong, and compare the error with what is promised."""
    with pytest.raises(row.error) as caught:
        row.bad()
    assert type(caught.value) is row.error
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert [part for part in row.says if part not in message] == []
