"""The loss, what it returns besides, and the model state."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import InvalidType, TreeMismatch, check_takes, received
from optimize_loss._names import leaf_paths, same_leaves
from optimize_loss._state.modules import Graph, fresh


def run_update_ops(
    ops: tuple[Callable[..., Any], ...], model_state: Any, batch: tuple[Any, ...]
) -> Any:
    """Return the model state after functions of it, or of it and the batch, in order."""
    for op in ops:
        own = fresh(model_state)
        args = (own, *batch) if _takes_batch(op, batch) else (own,)
        model_state = like_model_state("`update_ops`", op(*args), model_state)
    return model_state


def _takes_batch(op: Callable[..., Any], batch: tuple[Any, ...]) -> bool:
    """Return whether an update op must be given the batch: defaults are not filled by it."""
    try:
        signature = inspect.signature(op)
    except ValueError:
        return False
    kinds = [p.kind for p in signature.parameters.values() if p.default is p.empty]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wants = inspect.Parameter.VAR_POSITIONAL in kinds or sum(k in positional for k in kinds) > 1
    rule = "`update_ops` must be functions of the model_state, or of it and the batch."
    check_takes(rule, op, None, *(batch if wants else ()))
    return wants


def is_array(value: Any) -> bool:
    """Return whether `value` is an array or a number."""
    return isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def like_model_state(source: str, new: Any, old: Any) -> Any:
    """Return `new` with the very avals of `old`, so that nothing is traced again.

    Args:
      source: what returned it, for messages.
      new: the model state that came.
      old: the model state before.

    Raises:
      InvalidType: a leaf is neither an array nor a number.
      TreeMismatch: structure, shape or dtype differ.
    """
    try:
        leaves = same_leaves("model_state", new, "model_state before", old)
        if missing := [n for n, x in zip(leaf_paths(old), leaves, strict=True) if x is None]:
            raise TreeMismatch(f"`model_state` must keep its leaves. Received: None at {missing}.")
    except TreeMismatch as error:
        raise TreeMismatch(f"{error} It came from {source}.") from error
    places = zip(leaf_paths(old), jax.tree.leaves(old), leaves, strict=True)
    return jax.tree.unflatten(
        jax.tree.structure(old), [_like(source, name, was, now) for name, was, now in places]
    )


def _like(source: str, name: str, old: jax.Array, new: Any) -> jax.Array:
    if not is_array(new):
        raise InvalidType(
            f"`model_state` from {source} must be arrays. Received: {new!r} at {name!r}."
        )
    was, now = jax.typeof(old), jax.typeof(new)
    if (was.shape, was.dtype) != (now.shape, now.dtype):
        raise TreeMismatch(
            f"`model_state` from {source} must stay {was.str_short()} at {name!r}. "
            f"Received: {now.str_short()}."
        )
    return new if jnp.issubdtype(was.dtype, jax.dtypes.extended) else jnp.asarray(new, was.dtype)


class Aux(NamedTuple):
    """Extra results of a loss: `return loss, Aux(metrics=...)`.

    Attributes:
      metrics: {name: array}, reported together with the step's own metrics.
      model_state: the new model state, with the structure, shapes and dtypes of the old one; None
        keeps the old one.
      weight: the size of the batch over which the loss is a mean, such as its number of tokens, at
        least 0: a scalar, for `Accumulate(reduce="weighted")`. If the step sums gradients over
        devices, their mean is used.

    Example:
      >>> import optimize_loss as ol
      >>> def loss(params, x):
      ...     error = params["w"] - x
      ...     return error**2, ol.Aux(metrics={"error": error})
      >>> step = ol.optimize_loss(loss, learning_rate=0.1)
      >>> state, metrics = step(step.init({"w": 5.0}), 2.0)
      >>> print(metrics["loss"], metrics["error"])
      9.0 3.0
    """

    metrics: Mapping[str, Any] = {}
    model_state: Any = None
    weight: Any = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """A function of `(params, *batch)`, with what its signature asks for."""

    function: Callable[..., Any]

    def __post_init__(self):
        if not callable(self.function):
            raise InvalidType(
                "`loss` must be a function of (params, *batch) that returns a scalar, not its "
                f"value. {received('loss', self.function)}"
            )

    @functools.cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return dict(inspect.signature(self.function).parameters)
        except ValueError:  # it has no signature to look at
            return {}

    def takes(self, name: str) -> bool:
        """Return whether the function declares the keyword-only parameter `name`.

        Raises:
          InvalidType: it has such a parameter, with a default, that could also be positional.
        """
        if name not in self._parameters or name in getattr(self.function, "keywords", {}):
            return False
        parameter = self._parameters[name]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is None:
            raise InvalidType(
                f"`{name}` of the loss must be keyword-only, as in `loss(params, x, *, {name})`. "
                f"Received: a function with signature {inspect.signature(self.function)}."
            )
        return parameter.kind is parameter.KEYWORD_ONLY

    def __call__(
        self,
        params: Any,
        batch: tuple[Any, ...],
        model_state: Any,
        key: Any,
        graph: Graph | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Return the loss and what came beside it.

        Args:
          params: the parameters.
          batch: the batch.
          model_state: what the loss keeps besides parameters, or None.
          key: a random key, or None.
          graph: of the module that the loss takes in place of parameters; None for parameters.

        Raises:
          InvalidType: the function does not take this batch, or returns no float scalar, alone
            or with an `Aux`.
          ValueError: the loss has dimensions.
          TreeMismatch: the model state changed its structure, shapes or dtypes.
        """
        model = params if graph is None else graph.join(params, model_state)
        given = {"model_state": fresh(model_state), "key": key}
        keywords = {name: value for name, value in given.items() if self.takes(name)}
        parts = f"{len(batch)} part" + ("" if len(batch) == 1 else "s")
        if len(batch) == 1 and isinstance(batch[0], tuple | list):
            parts += f", a {type(batch[0]).__name__} (`step(state, *batch)` passes what is in it)"
        check_takes(
            f"`loss` must take (params, *batch), where this batch has {parts}; `model_state` and "
            "`key` are keyword-only, after a `*`.",
            self.function,
            model,
            *batch,
            **keywords,
        )
        try:
            result = self.function(model, *batch, **keywords)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            error.add_note(
                "`loss` runs inside jit, where arrays have no values: use jnp for np, jnp.where or "
                "jax.lax.cond for `if`, jax.debug.print for print, and return values in "
                "`Aux(metrics=...)` instead of calling float()."
            )
            raise
        loss, aux = _parted(result)
        if graph is not None:
            aux = _of_module(aux, graph.rest(model, params), model_state)
        return _check_scalar(loss), _check_aux(aux, model_state)


def _parted(result: Any) -> tuple[Any, Aux]:
    """Return the loss and what came beside it, of what a loss returns."""
    loss, aux = result, Aux()
    if isinstance(result, tuple) and not isinstance(result, Aux) and len(result) == 2:
        loss, aux = result
    if not isinstance(aux, Aux) or isinstance(loss, Aux):
        raise InvalidType(
            "`loss` must return a scalar, or (scalar, Aux(metrics=..., model_state=...)). "
            f"Received: {', '.join(type(x).__name__ for x in (loss, aux))}."
        )
    return loss, aux


def _of_module(aux: Aux, rest: Any, old: Any) -> Aux:
    """Return what a loss of a module gives back, with the state of the module.

    Raises:
      TreeMismatch: the module has state that it did not have before.
      ValueError: the loss returns a model state, too.
    """
    if added := sorted({*leaf_paths(rest)} - {*leaf_paths(old)}):
        raise TreeMismatch(
            f"`loss` must leave no new state in the module. Received: {added[:5]}. Take it out, as "
            "in `nnx.pop(model, nnx.Intermediate)`, and return it in `Aux(metrics=...)`."
        )
    if aux.model_state is not None:
        raise ValueError(
            "`model_state` must not be returned by a loss of a module: the state that it leaves in "
            "the module is taken. " + received("model_state", aux.model_state)
        )
    return aux._replace(model_state=rest)


def _check_scalar(loss: Any) -> jax.Array:
    if not isinstance(loss, jax.Array | int | float | complex) and not hasattr(loss, "dtype"):
        raise InvalidType(
            f"`loss` must return a scalar. Received: {loss!r} of type {type(loss).__name__}."
        )
    loss = jnp.asarray(loss)
    if loss.shape:
        raise ValueError(
            f"`loss` must return a scalar, such as a mean. Received: shape {loss.shape}."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise InvalidType(f"`loss` must return a float. Received: dtype {loss.dtype}.")
    return loss


def _check_aux(aux: Aux, old: Any) -> Aux:
    _check_metrics(aux.metrics)
    _check_weight(aux.weight)
    if aux.model_state is None:
        return aux._replace(model_state=old)
    if old is None:
        raise TreeMismatch(
            "`loss` returned a model_state, but the state has none to replace: give the first one "
            "to `step.init(params, model_state=...)`."
        )
    return aux._replace(model_state=like_model_state("`loss`", aux.model_state, old))


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, Mapping):
        raise InvalidType(f"`metrics` must map names to arrays. {received('metrics', metrics)}")
    for name, value in metrics.items():
        if not isinstance(name, str) or not all(map(is_array, jax.tree.leaves(value))):
            raise InvalidType(
                f"`metrics` must map names to arrays. Received: metrics[{name!r}] = {value!r}."
            )


def _check_weight(weight: Any) -> None:
    if weight is None:
        return
    if not is_array(weight) or jnp.issubdtype(jnp.result_type(weight), jnp.complexfloating):
        raise InvalidType(f"`weight` must be a real number. {received('weight', weight)}")
    if jnp.shape(weight):
        raise ValueError(f"`weight` must be a scalar. Received: shape {jnp.shape(weight)}.")
