"""Which parameters are trained, and the gradients of the loss with respect to them."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

from optimize_loss._names import Pattern, first_matches, leaf_names
from optimize_loss._state.loss import Aux
from optimize_loss.transforms import Accumulate, Chain, DivideByLossScale, SumOverAxis
from optimize_loss.transforms._accumulate import averaged_over
from optimize_loss.transforms._sharpness import Sharpness, climbed


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A tree of parameters with a mark for each leaf: whether it is trained."""

    params: Any
    marks: tuple[bool, ...]

    @property
    def leaves(self) -> list[Any]:
        """The leaves that are trained."""
        return [x for x, t in zip(jax.tree.leaves(self.params), self.marks, strict=True) if t]

    @property
    def names(self) -> list[str]:
        """The names of the leaves that are trained."""
        return [n for n, t in zip(leaf_names(self.params), self.marks, strict=True) if t]

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Return a tree like the parameters with `leaves`, and None for what is not trained."""
        rest = iter(leaves)
        return self._unflatten(next(rest) if t else None for t in self.marks)

    def replace(self, leaves: Sequence[Any]) -> Any:
        """Return the parameters with `leaves` in place of those that are trained."""
        rest, old = iter(leaves), jax.tree.leaves(self.params)
        return self._unflatten(next(rest) if t else x for x, t in zip(old, self.marks, strict=True))

    def _unflatten(self, leaves: Iterator[Any]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.params), leaves)


def find_trainable(
    params: Any,
    variables: tuple[Pattern, ...] | None,
    frozen: Callable[[Sequence[str]], list[bool]] | None = None,
) -> Trainable:
    """Mark the float parameters that `variables` names and `frozen` does not select.

    Args:
      params: a tree of arrays.
      variables: names or patterns; None for all.
      frozen: returns for each name whether its parameter is frozen; None if no parameter is.

    Raises:
      ValueError: a pattern matches no parameter, or nothing is to be trained.
    """
    names = leaf_names(params)
    chosen: list[Any] = [0] * len(names)
    if variables is not None:
        chosen = first_matches("variables", variables, names)
    kept = [False] * len(names) if frozen is None else frozen(names)
    each = zip(jax.tree.leaves(params), chosen, kept, strict=True)
    marks = [c is not None and not k and _is_float(leaf) for leaf, c, k in each]
    if not any(marks):
        limits = ["`variables` names"] * bool(variables) + ["`rules` do not freeze"] * any(kept)
        raise ValueError(
            "There are no variables to optimize: `params` has no float parameter"
            + (f" that {' and '.join(limits)}." if limits else ".")
            + f" Parameters: {names}; integers are not trained, so write 1.0 for 1."
        )
    return Trainable(params, tuple(marks))


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def gradients(
    loss: Callable[[Any], tuple[jax.Array, Any]], trainable: Trainable, scale: Any = None
) -> tuple[jax.Array, Any, list[Any]]:
    """Return what `derivatives` does, if the loss depends on a parameter.

    Raises:
      ValueError: the loss depends on no parameter. If it depends on some, there is a warning.
    """
    value, aux, grads = derivatives(loss, trainable, scale)
    unused = [name for name, g in zip(trainable.names, grads, strict=True) if g is None]
    if len(unused) == len(grads):
        raise ValueError(f"No gradients: the loss depends on none of the parameters {unused}.")
    if unused:
        warnings.warn(
            f"The loss does not depend on the parameters {unused}: they get no gradient and no "
            "update. If that is meant, leave them out with `variables`.",
            stacklevel=2,
        )
    return value, aux, grads


def derivatives(
    loss: Callable[[Any], tuple[jax.Array, Any]], trainable: Trainable, scale: Any = None
) -> tuple[jax.Array, Any, list[Any]]:
    """Return the loss, what came beside it, and the gradient of each trained leaf.

    The gradient is None where the loss has no derivative with respect to a leaf. Gradients of
    complex parameters are conjugated, so that a step against them goes downhill.

    Args:
      loss: from all parameters to a real scalar and something beside it.
      trainable: the parameters, and which are trained.
      scale: where given, a factor of the gradients, present throughout the backward pass of the
        loss; the loss itself is returned as it is.
    """

    def loss_of(leaves: list[Any]) -> tuple[jax.Array, Any]:
        return loss(trainable.replace(leaves))

    leaves = trainable.leaves
    # What jax.grad does, in two parts: between them the derivative tells what it depends on.
    value, derivative, aux = jax.linearize(loss_of, leaves, has_aux=True)
    _, used = partial_eval.dce_jaxpr(jax.make_jaxpr(derivative)(leaves).jaxpr, [True])
    cotangent = jnp.ones_like(value) if scale is None else scale.astype(value.dtype)
    (grads,) = jax.linear_transpose(derivative, leaves)(cotangent)
    return value, aux, [g.conj() if u else None for g, u in zip(grads, used, strict=True)]


def colocated(grads: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Return the gradients, each constrained to its parameter's sharding where that is a mesh's."""

    def constrained(grad: Any, sharding: Any) -> Any:
        if grad is None or sharding is None or len(sharding.device_set) == 1:
            return grad
        return jax.lax.with_sharding_constraint(grad, sharding)

    return [constrained(g, s) for g, s in zip(grads, shardings, strict=True)]


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

    Where gradients are summed over mapped devices, these are the means of all devices: anything
    that depends on them, such as skips, must be the same everywhere.

    Raises:
      ValueError: the loss scale with which the chain was built is infinite in the loss' dtype.
    """
    links = [link for _, link in chain.links]
    _check_scale(links, loss.dtype)
    numbers = {"value": loss}
    if aux.weight is not None and any(map(_takes_weight, links)):
        numbers["weight"] = jnp.asarray(aux.weight)
    for axes in [link.axis_name for link in links if isinstance(link, SumOverAxis)]:
        numbers = {name: averaged_over(x, axes) for name, x in numbers.items()}
    return numbers


def _takes_weight(link: Any) -> bool:
    weighs = not isinstance(link, Accumulate) or link.reduce == "weighted"
    return getattr(link, "needs", None) == "loss_and_weight" and weighs


def for_line_searches(
    chain: Chain,
    trainable: Trainable,
    loss: Callable[[Any], tuple[jax.Array, Aux]],
    grads: Sequence[Any],
    scale: jax.Array | None,
) -> dict[str, Any]:
    """Return the gradient, and the loss of given parameters, by optax's keywords.

    Only for a chain with a transformation of optax that may take them. They are those of this
    batch, and so are skipped where gradients are summed over devices. A chain leaves them out
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
    pairs = zip(trainable.leaves, grads, strict=True)
    return {
        "grad": trainable.tree([_unscaled(p, g, scale) for p, g in pairs]),
        "value_fn": lambda params: loss(trainable.replace(jax.tree.leaves(params)))[0],
    }


def _unscaled(param: Any, grad: Any, scale: jax.Array | None) -> jax.Array:
    grad = jnp.zeros_like(param) if grad is None else grad
    return grad if scale is None else grad / scale.astype(grad.dtype)


def _check_scale(links: Sequence[Any], dtype: Any) -> None:
    """Raise if a scale that stays is too large for the loss; one that is dynamic shrinks."""
    scales = [link.loss_scale for link in links if isinstance(link, DivideByLossScale)]
    fixed = [scale for scale in scales if isinstance(scale, float)]
    most = float(jnp.finfo(dtype).max)
    if math.prod(fixed) > most:
        raise ValueError(
            f"`loss_scale` must be at most {most:g}, for a loss of dtype {dtype}: the gradients "
            f"would be infinite. Received: loss_scale={math.prod(fixed)}."
        )
