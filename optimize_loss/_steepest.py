"""The gradients of a step: where the parameters are, or where the loss is worst nearby."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from optimize_loss._loss import Aux
from optimize_loss._trainable import Trainable, derivatives, gradients
from optimize_loss.transforms import Accumulate, Chain
from optimize_loss.transforms._sharpness import climbed


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


def weight_of(aux: Aux, chain: Chain) -> dict[str, Any]:
    """Return the weight of a loss, by the keyword for a chain that has a use for it."""
    links = (link for _, link in chain.links)
    takes = any(isinstance(link, Accumulate) and link.reduce == "weighted" for link in links)
    return {"weight": aux.weight} if takes and aux.weight is not None else {}
