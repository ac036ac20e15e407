"""A box with a name and a value, for code that updates in place."""

import contextlib
import contextvars
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import InvalidType, TreeMismatch, received


def _trace_state() -> Any:
    """Return what tells the transformation of JAX that is going on from others."""
    try:  # here, as it loads Pallas, which imports of ours need not wait for
        from jax.extend.core import get_opaque_trace_state
    except ImportError:  # before jax 0.9
        from jax.core import get_opaque_trace_state
    return get_opaque_trace_state(convention="nnx")


def _forwarded(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that applies `operation` to the value of the box."""

    def method(self: "Variable", *others: Any) -> Any:
        return operation(self.value, *(value_of(other) for other in others))

    return method


def _reflected(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Return a method for an operation whose second operand is the box."""
    return _forwarded(lambda value, other: operation(other, value))


_SERIAL = itertools.count()
_WITNESSES: contextvars.ContextVar[tuple[list["Variable"], ...]] = contextvars.ContextVar(
    "witnesses", default=()
)


@contextlib.contextmanager
def made_meanwhile() -> Iterator[list["Variable"]]:
    """Give a list, in which all variables appear that are made until the end of the block."""
    made: list[Variable] = []
    before = _WITNESSES.set((*_WITNESSES.get(), made))
    try:
        yield made
    finally:
        _WITNESSES.reset(before)


def value_of(x: Any) -> Any:
    """Return the value of a `Variable`, and anything else as it is."""
    return x.value if isinstance(x, Variable) else x


class Variable:
    """A named box around an array, updated in place by `assign` and by optimizers.

    It takes part in arithmetic and in functions of `jax.numpy` as its value does, and has the
    methods of an array. Where JAX takes trees apart, as `jax.jit(f)(v)` and `jax.tree.leaves(v)`
    do, its value comes out; a box never comes back. Functions of `jax.lax` want `v.value`. Two
    variables are equal only if they are the same one.

    A box keeps no traced value beyond the transformation that it was made in: `assign` raises. A
    function under `jax.jit` that reads a box from outside sees the value of its first call only.

    Args:
      initial_value: a number, an array, a list of numbers, or a `Variable`.
      name: its name; `/` separates the parts.
      dtype: that of the value if not given.
      trainable: whether `minimize` may update it; a mark for the user.
      constraint: a function of the value, applied after every update by an optimizer.

    Example:
      >>> import optimize_loss as ol
      >>> v = ol.Variable(2.0, name="scale")
      >>> print(v.assign_sub(0.5), 2 * v + 1)
      1.5 4.0

    References:
      `tf.Variable`; assignment to another shape or dtype is an error here too.
    """

    __array_priority__ = 100  # numpy leaves operators to the box

    def __init__(
        self,
        initial_value: Any,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        constraint: Callable[[jax.Array], jax.Array] | None = None,
    ):
        if name is not None and not isinstance(name, str):
            raise InvalidType(f"`name` must be text. {received('name', name)}")
        if constraint is not None and not callable(constraint):
            raise InvalidType(
                "`constraint` must be a function of the value. "
                f"{received('constraint', constraint)}"
            )
        value = value_of(initial_value)
        with _concrete(value):
            # A copy, as another program may take the caller's memory; of a strong type.
            array = jnp.array(_as_array("initial_value", value), as_dtype(dtype))
            self._value = array.astype(array.dtype)
        self.name = name or "Variable"
        self.trainable = trainable
        self.constraint = constraint
        self._mark()

    def _mark(self) -> None:
        """Note where the box was made, and give it a name that no other box ever has."""
        self._trace = _trace_state()
        self._unique_id = f"{self.name}_{next(_SERIAL)}"
        for made in _WITNESSES.get():
            made.append(self)

    @property
    def value(self) -> jax.Array:
        """The array."""
        return self._value

    @property
    def path(self) -> str:
        """The name, as Keras 3 calls it."""
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value, which never changes."""
        return self._value.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the value, which never changes."""
        return self._value.dtype

    @property
    def _committed(self) -> bool:  # `jnp.zeros_like` asks
        return getattr(self._value, "_committed", True)

    def assign(self, value: Any) -> "Variable":
        """Put another value into the box, in the box's dtype.

        Args:
          value: of the box's shape.

        Raises:
          TreeMismatch: the shape differs.
          InvalidType: a real box is given a complex value, or a float for integers; or a box made
            outside of a JAX transformation is given a value traced inside.
        """
        new = self._in_own_dtype("value", value)
        if new.shape != self.shape:
            raise TreeMismatch(
                f"The variable {self.name!r} must keep its shape {self.shape}. "
                f"Received: shape {new.shape}."
            )
        if self.is_elsewhere(new):
            raise InvalidType(
                f"The variable {self.name!r} was made outside of the JAX transformation (jit, "
                "grad, vmap, scan) that assigns to it, and cannot keep what is traced inside. Make "
                "it inside, or use the functions `init` and `update` of an optimizer. "
                f"Received: {value_of(value)}."
            )
        known = not isinstance(new, Tracer) and not isinstance(self._value, Tracer)
        if known and self._value.committed and not new.committed:
            new = jax.device_put(new, self._value.sharding)
        self._value = new
        return self

    def is_elsewhere(self, *values: Any) -> bool:
        """Return whether these values are traced, now, by what the box was not made in."""
        if self._trace == _trace_state():
            return False
        # Under jit constants count too: what happens to them happens once, not at every call.
        traced = any(isinstance(x, Tracer) for x in values)
        return traced or isinstance(jnp.zeros(()), Tracer)

    def assign_add(self, delta: Any) -> "Variable":
        """Add to the value; the same errors as of `assign`.

        Args:
          delta: what to add.
        """
        return self.assign(self._value + self._in_own_dtype("delta", delta))

    def assign_sub(self, delta: Any) -> "Variable":
        """Subtract from the value; the same errors as of `assign`.

        Args:
          delta: what to subtract.
        """
        return self.assign(self._value - self._in_own_dtype("delta", delta))

    def _in_own_dtype(self, argument: str, value: Any) -> jax.Array:
        """Return what is to be assigned or added as an array of the box's dtype, if it fits."""
        value = _as_array(argument, value_of(value))
        if isinstance(value, jax.Array) and value.dtype == self.dtype and not value.weak_type:
            return value  # what an optimizer assigns, many times a step
        dtype = jnp.result_type(value)
        if not any(_is_at_most(dtype, self.dtype, kind) for kind in _KINDS):
            raise InvalidType(
                f"The variable {self.name!r} must keep its dtype {self.dtype}. Received: {dtype}."
            )
        return jnp.asarray(value, self.dtype)

    def read_value(self) -> jax.Array:
        """Return the array."""
        return self._value

    def numpy(self) -> np.ndarray:
        """Return a copy of the value for numpy."""
        return np.array(self._value)

    def __jax_array__(self) -> jax.Array:
        return self._value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._value, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"A Variable has no attribute {name!r}.")
        return getattr(self._value, name)

    def __repr__(self) -> str:
        return f"Variable({self._value!r}, name={self.name!r})"

    def __str__(self) -> str:
        return str(self._value)

    def __format__(self, spec: str) -> str:
        return format(self._value, spec)

    def __eq__(self, other: object) -> Any:
        return self is other if isinstance(other, Variable) else self._value == other

    def __ne__(self, other: object) -> Any:
        return self is not other if isinstance(other, Variable) else self._value != other

    __hash__ = object.__hash__

    def __getstate__(self) -> dict[str, Any]:
        marks = ("_trace", "_unique_id")
        return {name: x for name, x in self.__dict__.items() if name not in marks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._mark()  # a copy is another box

    __add__, __radd__ = _forwarded(operator.add), _reflected(operator.add)
    __sub__, __rsub__ = _forwarded(operator.sub), _reflected(operator.sub)
    __mul__, __rmul__ = _forwarded(operator.mul), _reflected(operator.mul)
    __truediv__, __rtruediv__ = _forwarded(operator.truediv), _reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = _forwarded(operator.floordiv), _reflected(operator.floordiv)
    __mod__, __rmod__ = _forwarded(operator.mod), _reflected(operator.mod)
    __pow__, __rpow__ = _forwarded(operator.pow), _reflected(operator.pow)
    __matmul__, __rmatmul__ = _forwarded(operator.matmul), _reflected(operator.matmul)
    __and__, __rand__ = _forwarded(operator.and_), _reflected(operator.and_)
    __or__, __ror__ = _forwarded(operator.or_), _reflected(operator.or_)
    __xor__, __rxor__ = _forwarded(operator.xor), _reflected(operator.xor)
    __lshift__, __rlshift__ = _forwarded(operator.lshift), _reflected(operator.lshift)
    __rshift__, __rrshift__ = _forwarded(operator.rshift), _reflected(operator.rshift)
    __divmod__, __rdivmod__ = _forwarded(divmod), _reflected(divmod)
    __lt__, __le__ = _forwarded(operator.lt), _forwarded(operator.le)
    __gt__, __ge__ = _forwarded(operator.gt), _forwarded(operator.ge)
    __neg__, __pos__, __abs__ = (_forwarded(f) for f in (operator.neg, operator.pos, operator.abs))
    __invert__, __round__ = _forwarded(operator.invert), _forwarded(round)
    __bool__, __int__, __float__, __complex__ = (_forwarded(f) for f in (bool, int, float, complex))
    __index__, __len__, __iter__ = (_forwarded(f) for f in (operator.index, len, iter))
    __getitem__ = _forwarded(operator.getitem)


# One way: JAX gets the value out, and makes no box of what it has computed. A box that jit makes
# for a function would lose what is assigned to it there.
jax.tree_util.register_pytree_with_keys(
    Variable,
    lambda box: (((jax.tree_util.GetAttrKey("value"), box.value),), None),
    lambda _, values: next(iter(values)),
    lambda box: ((box.value,), None),
)


class VariableList(list[Variable]):
    """A list that returns itself when it is called, as code for Keras 2 does."""

    def __call__(self) -> "VariableList":
        """Return the list."""
        return self


def is_variable(x: Any) -> bool:
    """Return whether `x` is a `Variable`; where given as `is_leaf`, trees keep their boxes."""
    return isinstance(x, Variable)


def placed(old: jax.Array, value: Any) -> jax.Array:
    """Return `value` where the array `old` is."""
    stays = isinstance(old, Tracer) or isinstance(value, Tracer) or not old.committed
    return jnp.asarray(value) if stays else jax.device_put(value, old.sharding)


def _concrete(value: Any) -> contextlib.AbstractContextManager[Any]:
    """Keep a known value known, also while something else is being traced."""
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(value))
    return contextlib.nullcontext() if traced else jax.ensure_compile_time_eval()


def _as_array(argument: str, value: Any) -> Any:
    """Return an array or a number as it is, and a list as an array."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    if isinstance(value, bool | int | float | complex):
        return value
    try:
        if value is None or isinstance(value, str | bytes):
            raise TypeError("no number")
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise InvalidType(
            f"`{argument}` must be an array or a number. {received(argument, value)}"
        ) from error


def as_dtype(dtype: Any) -> np.dtype | None:
    """Return a dtype, or None for None."""
    try:
        return None if dtype is None else jnp.dtype(dtype)
    except TypeError as error:
        raise InvalidType(f"`dtype` must be a dtype. {received('dtype', dtype)}") from error


_KINDS = (jnp.integer, jnp.floating, jnp.complexfloating, jnp.bool_)


def _is_at_most(dtype: Any, kept: Any, kind: Any) -> bool:
    """Return whether `kept` is of this kind, and `dtype` of it or of one that fits into it."""
    fits = {jnp.floating: (jnp.integer, jnp.floating), jnp.complexfloating: (jnp.number,)}
    kinds = fits.get(kind, (kind,))
    return jnp.issubdtype(kept, kind) and any(jnp.issubdtype(dtype, k) for k in kinds)


def check_variables(variables: Any) -> list[Variable]:
    """Return a list of variables, each once.

    Raises:
      InvalidType: there is something else in it.
      ValueError: one comes twice.
    """
    if isinstance(variables, Variable) or not isinstance(variables, Iterable):
        variables = [variables]
    found = list(variables)
    for v in found:
        if not isinstance(v, Variable):
            raise InvalidType(
                "`var_list` must be a list of `optimize_loss.Variable`. "
                f"Received: {v!r} of type {type(v).__name__}."
            )
    if len({id(v) for v in found}) < len(found):
        names = [v.name for v in found]
        raise ValueError(f"`var_list` must have each variable once. Received: {names}.")
    return found


def check_trace(optimizer: Any, values: Iterable[Any]) -> None:
    """Raise if an optimizer was made outside of the transformation that uses it."""
    if optimizer.iterations.is_elsewhere(*values):
        raise InvalidType(
            "An optimizer that is made outside of a JAX transformation (jit, grad, vmap, scan) "
            "cannot keep what is traced inside. Make it inside, or use its functions `init` "
            f"and `update`. Received: {optimizer!r}."
        )


def different_names(names: Iterable[str]) -> list[str]:
    """Return the names, with a number behind those that came before.

    Example:
      >>> different_names(["kernel", "bias", "kernel"])
      ['kernel', 'bias', 'kernel_1']
    """
    found: list[str] = []
    for name in names:
        tries = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        found.append(next(x for x in tries if x not in found))
    return found
