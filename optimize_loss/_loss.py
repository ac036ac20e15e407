"""Calling the user's loss: what it may take, what it may return, and what it depends on."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimize_loss._checks import InvalidType, TreeMismatch, check_takes, received
from optimize_loss._model_state import is_array, like_model_state


class Aux(NamedTuple):
    """What a loss may return beside its value: `return loss, Aux(metrics=...)`.

    Attributes:
      metrics: {name: array}, reported beside the step's own metrics.
      model_state: the new model state, with the structure, shapes and dtypes of the old one; None
        keeps the old one.
      weight: how much there was in the batch over which the loss is a mean, such as its number of
        tokens, at least 0: a scalar, for `Accumulate(reduce="weighted")`. Of devices whose
        gradients are summed in the step it is the mean.

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
        self, params: Any, batch: tuple[Any, ...], model_state: Any, key: Any
    ) -> tuple[jax.Array, Aux]:
        """Return the loss and what came beside it.

        Raises:
          InvalidType: the function does not take this batch, or returns no float scalar, alone
            or with an `Aux`.
          ValueError: the loss has dimensions.
          TreeMismatch: the model state changed its structure, shapes or dtypes.
        """
        given = {"model_state": model_state, "key": key}
        keywords = {name: value for name, value in given.items() if self.takes(name)}
        parts = f"{len(batch)} part" + ("" if len(batch) == 1 else "s")
        check_takes(
            f"`loss` must take (params, *batch), where this batch has {parts}; `model_state` and "
            "`key` are keyword-only, after a `*`.",
            self.function,
            params,
            *batch,
            **keywords,
        )
        try:
            result = self.function(params, *batch, **keywords)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            error.add_note(
                "`loss` runs inside jit, where arrays have no values: use jnp for np, jnp.where or "
                "jax.lax.cond for `if`, jax.debug.print for print; return in `Aux(metrics=...)` "
                "what float() was for."
            )
            raise
        loss, aux = result, Aux()
        if isinstance(result, tuple) and not isinstance(result, Aux) and len(result) == 2:
            loss, aux = result
        if not isinstance(aux, Aux) or isinstance(loss, Aux):
            raise InvalidType(
                "`loss` must return a scalar, or (scalar, Aux(metrics=..., model_state=...)). "
                f"Received: {', '.join(type(x).__name__ for x in (loss, aux))}."
            )
        return _check_scalar(loss), _check_aux(aux, model_state)


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
    if not isinstance(aux.metrics, Mapping):
        raise InvalidType(f"`metrics` must map names to arrays. {received('metrics', aux.metrics)}")
    for name, value in aux.metrics.items():
        leaves = jax.tree.leaves(value)
        if not isinstance(name, str) or not all(map(is_array, leaves)):
            raise InvalidType(
                f"`metrics` must map names to arrays. Received: metrics[{name!r}] = {value!r}."
            )
    if aux.weight is not None:
        if not is_array(aux.weight) or jnp.issubdtype(
            jnp.result_type(aux.weight), jnp.complexfloating
        ):
            raise InvalidType(f"`weight` must be a real number. {received('weight', aux.weight)}")
        if jnp.shape(aux.weight):
            raise ValueError(f"`weight` must be a scalar. Received: shape {jnp.shape(aux.weight)}.")
    if aux.model_state is None:
        return aux._replace(model_state=old)
    if old is None:
        raise TreeMismatch(
            "`loss` returned a model_state, but the state has none to replace: give the first one "
            "to `step.init(params, model_state=...)`."
        )
    return aux._replace(model_state=like_model_state("`loss`", aux.model_state, old))
