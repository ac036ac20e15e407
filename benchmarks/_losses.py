"""The losses of the problems, for peers on JAX: functions of the parameters and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._problems import TRANSFORMER, Problem


def vector(params: Any) -> jax.Array:
    return jnp.concatenate([params[name].ravel() for name in sorted(params)])


@jax.custom_vjp
def _nothing(flat: jax.Array, grads: jax.Array) -> jax.Array:
    return jnp.zeros(())


_nothing.defvjp(lambda flat, grads: (jnp.zeros(()), grads), lambda grads, _: (grads, None))


def given(params: Any, grads: jax.Array) -> jax.Array:
    """A loss whose gradient is given, and costs nothing: what is left of a step is the update."""
    return _nothing(vector(params), grads)


def distance(params: Any, x: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((vector(params) - x) ** 2)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -jnp.mean(picked)


def digits(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for i in range(2):
        x = jax.nn.relu(x @ params[f"w{i}"] + params[f"b{i}"])
    return cross_entropy(x @ params["w2"] + params["b2"], y)


def normalized(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + shift


def transformer(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens[:, :-1]]
    batch, length, width = x.shape
    heads = TRANSFORMER["heads"]
    masked = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -1e9).astype(x.dtype)
    for i in range(sum(name.endswith("/q") for name in params)):
        p = {name.partition("/")[2]: v for name, v in params.items() if name.startswith(f"{i}/")}
        y = normalized(x, p["scale_1"], p["shift_1"])
        q, k, v = ((y @ p[n]).reshape(batch, length, heads, -1) for n in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // heads) ** 0.5 + masked
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + mixed.reshape(x.shape) @ p["out"]
        y = normalized(x, p["scale_2"], p["shift_2"])
        x = x + jax.nn.gelu(y @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]
    x = normalized(x, params["scale"], params["shift"])
    return cross_entropy(x @ params["embed"].T, tokens[:, 1:])


LOSSES = {"update": given, "vector": distance, "digits": digits, "transformer": transformer}


def loss_of(problem: Problem) -> Callable[..., jax.Array]:
    return LOSSES[problem.kind]
