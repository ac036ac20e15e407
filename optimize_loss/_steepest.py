"""The gradients of a step: where the parameters are, or where the loss is worst nearby."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimize_loss._loss import Aux
from optimize_loss._trainable import Trainable, derivatives, gradients
from optimize_loss.transforms import Accumulate, Chain, DivideByLossScale, SumOverAxis
from optimize_loss.transforms._accumulate import averaged_over
from optimize_loss.transforms._sharpness import Sharpness, climbed


def flat_gradients(
    loss: Callable[[Any], tuple[jax.Array, Aux]],
    trainable: Trainable,
    scale: jax.Array | None,
    rho: jax.Array | None,
) -> tuple[jax.Array, Aux, list[Any]]:
    """Return the loss, what came beside it, and its gradients; with `rho` those of a worse place.

    Loss, metrics and model state are those of the parameters as they are.

    Args:
      loss: as for `gradients`.
      trainable: the parameters, and which are trained.
      scale: as for `gradients`.
      rho: how far away the worse place is; None for gradients of the parameters as they are.
    """
    value, aux, grads = gradients(loss, trainable, scale)
    if rho is None:
        return value, aux, grads
    leaves = climbed(trainable.leaves, grads, rho)
    above = dataclasses.replace(trainable, params=trainable.replace(leaves))
    _, _, grads = derivatives(loss, above, scale)
    return value, aux, grads


def radius(chain: Chain, state: dict[str, Any], step: jax.Array) -> jax.Array | None:
    """Return how far away the worse place is at this step; None without `Sharpness`."""
    names = [name for name, link in chain.links if isinstance(link, Sharpness)]
    return chain.numbers_named("rho", state, step)[names[0]] if names else None


def told(loss: jax.Array, aux: Aux, chain: Chain) -> dict[str, Any]:
    """Return the loss, by the keyword for a chain, and its weight for one that has a use for it.

    Where gradients are summed over mapped devices, these are the means of all devices: what goes
    by them, such as skips, must be the same everywhere.

    Raises:
      ValueError: the loss scale with which the chain was built is infinite in the loss' dtype.
    """
    links = [link for _, link in chain.links]
    _check_scale(links, loss.dtype)
    takes = any(isinstance(link, Accumulate) and link.reduce == "weighted" for link in links)
    numbers = {"value": loss}
    if takes and aux.weight is not None:
        numbers["weight"] = jnp.asarray(aux.weight)
    for axes in [link.axis_name for link in links if isinstance(link, SumOverAxis)]:
        numbers = {name: averaged_over(x, axes) for name, x in numbers.items()}
    return numbers


def for_line_searches(
    chain: Chain,
    trainable: Trainable,
    loss: Callable[[Any], tuple[jax.Array, Aux]],
    grads: Sequence[Any],
    scale: jax.Array | None,
) -> dict[str, Any]:
    """Return the gradient, and the loss of given parameters, by optax's keywords.

    Only for a chain with a transformation of optax that may take them. They are those of this
    batch, and so are left out where gradients are summed over devices. A chain leaves them out
    behind an `Accumulate`.

    Args:
      chain: the chain.
      trainable: the parameters, and which are trained.
      loss: as for `gradients`.
      grads: its gradients, each multiplied by the scale; None where there is none.
      scale: the loss scale, or None.
    """
    links = [link for _, link in chain.links]
    takes = any(isinstance(link, optax.GradientTransformationExtraArgs) for link in links)
    if not takes or any(isinstance(link, SumOverAxis) for link in links):
        return {}
    known = [
        jnp.zeros_like(p) if g is None else g for p, g in zip(trainable.leaves, grads, strict=True)
    ]
    known = known if scale is None else [g / scale.astype(g.dtype) for g in known]
    return {
        "grad": trainable.tree(known),
        "value_fn": lambda params: loss(trainable.replace(jax.tree.leaves(params)))[0],
    }


def _check_scale(links: Sequence[Any], dtype: Any) -> None:
    """Raise if a scale that stays is too large for the loss; one that is dynamic shrinks."""
    scales = [link.loss_scale for link in links if isinstance(link, DivideByLossScale)]
    fixed = [scale for scale in scales if not callable(scale)]
    most = float(jnp.finfo(dtype).max)
    if math.prod(fixed) > most:
        raise ValueError(
            f"`loss_scale` must be at most {most:g}, for a loss of dtype {dtype}: the gradients "
            f"would be infinite. Received: loss_scale={math.prod(fixed)}."
        )
