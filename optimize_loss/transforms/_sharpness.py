"""Take gradients at a nearby point where the loss is larger."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import compute_dtype, multiplied, norm, ratio
from optimize_loss._engine.link import Link, NotNegative


@dataclasses.dataclass(frozen=True)
class Sharpness(Link):
    """Hold the radius of `optimize_loss(sam=...)`; updates pass unchanged.

    Args:
      rho: ρ, at least 0, in the unit of the parameters.
    """

    rho: NotNegative
    elementwise = True


def climbed(params: Sequence[Any], grads: Sequence[Any], rho: jax.Array) -> list[Any]:
    """Return the parameters after a step of length ρ along the gradient.

        p + ρ · g / ‖g‖,   ‖g‖ over all parameters;  p where all gradients are 0

    Args:
      params: the parameters, in whose dtypes the result is.
      grads: a gradient for each; None stands for zeros.
      rho: ρ.

    References:
      P. Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
      2021, https://arxiv.org/abs/2010.01412, equation 2 and algorithm 1.
    """
    norms = [norm(_wide(g)).astype(rho.dtype) for g in grads if g is not None]
    total = norm(jnp.stack(norms))
    factors = ratio(rho, jnp.where(total == 0, 1, total))

    def step(p: Any, g: jax.Array) -> jax.Array:
        return multiplied(_wide(g), [_like(factor, p) for factor in factors])

    return [
        p if g is None else (_wide(p) + step(p, g)).astype(p.dtype)
        for p, g in zip(params, grads, strict=True)
    ]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(compute_dtype(x.dtype))


def _like(scale: jax.Array, param: jax.Array) -> jax.Array:
    return scale.astype(compute_dtype(param.dtype))
