"""Find optimizers and links by name, class, function or configuration."""

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

from optimize_loss._checks import InvalidType, check_choice, check_takes, received
from optimize_loss._engine.link import is_transformation
from optimize_loss._engine.numbers import has_rate
from optimize_loss._engine.order import arranged
from optimize_loss._engine.selection import linked
from optimize_loss.optimizers import _keras, _multi, _muon, _tf1
from optimize_loss.optimizers._declaration import CLASSES, deserialize, is_any
from optimize_loss.optimizers._optimizer import Optimizer
from optimize_loss.optimizers._tf1 import OPTIMIZER_CLS_NAMES
from optimize_loss.optimizers._variable import different_names
from optimize_loss.transforms import (
    Chain,
    Link,
    ScaleByAdamax,
    ScaleByLearningRate,
    ScaleByLion,
    ScaleByMuon,
)

for _module in (_keras, _muon, _tf1, _multi):
    found = [x for x in vars(_module).values() if isinstance(x, type) and issubclass(x, Optimizer)]
    CLASSES.update({cls.__name__: cls for cls in found if cls is not Optimizer})


def names(pattern: str = "*") -> list[str]:
    """Return the names of all optimizers that match a pattern, ignoring case.

    Args:
      pattern: `*` stands for any text, `?` for one letter.

    Example:
      >>> import optimize_loss as ol
      >>> ol.optimizers.names("ada*w")
      ['AdamW']
    """
    return sorted(name for name in CLASSES if fnmatch.fnmatch(name.lower(), pattern.lower()))


@overload
def get(identifier: None, custom_objects: Mapping[str, type[Optimizer]] | None = None) -> None: ...
@overload
def get(
    identifier: str | Mapping[str, Any] | Optimizer,
    custom_objects: Mapping[str, type[Optimizer]] | None = None,
) -> Optimizer: ...
def get(identifier: Any, custom_objects: Mapping[str, type[Optimizer]] | None = None) -> Any:
    """Return an optimizer from its name, with its defaults; from its configuration; or unchanged.

    None gives None, as in Keras.

    Args:
      identifier: a name, in any case; a dict as `serialize` returns it; an `Optimizer`; or None.
      custom_objects: classes by name, beside those of this package.

    Raises:
      InvalidType: it is something else, or a configuration of something else.
      ValueError: the name is unknown.

    Example:
      >>> import optimize_loss as ol
      >>> ol.optimizers.get("adamw")
      AdamW(learning_rate=0.001)
    """
    is_config = isinstance(identifier, Mapping)
    made = deserialize(identifier, custom_objects) if is_config else identifier
    if made is None or isinstance(made, Optimizer):
        return made
    if not isinstance(identifier, str):
        raise InvalidType(
            "`identifier` must be a name, a configuration or an optimizer. "
            f"{received('identifier', identifier)}"
        )
    known: dict[str, Any] = {**CLASSES, **(custom_objects or {})}
    by_lower = {name.lower(): name for name in known}
    name = by_lower.get(identifier.lower(), identifier)
    made = known[check_choice("identifier", name, sorted(known))]
    if missing := _without_default(made):
        raise InvalidType(
            f"`identifier` must be a configuration, as {made.__name__} has no default for "
            f"{missing}. {received('identifier', identifier)}"
        )
    return made()


def _without_default(made: Any) -> list[str]:
    """Return the names of arguments that must be given."""
    parameters = inspect.signature(made).parameters.values()
    return [p.name for p in parameters if not is_any(p) and p.default is p.empty]


def resolve(optimizer: Any, learning_rate: Any) -> dict[str, Any]:
    """Return the links of an optimizer, by name.

    Args:
      optimizer: a name, a subclass of `Optimizer`, a function of the rate (or of nothing, without
        a rate), an `Optimizer`, a chain or a link of ours, or an optax transformation.
      learning_rate: a number, a schedule, or None.

    Raises:
      InvalidType: it is something else, or a function that returns something else.
      ValueError: the name is unknown, or there is no learning rate, or there are two.
    """
    made = instance(optimizer, learning_rate)
    if isinstance(made, Optimizer):
        return _links(made)
    _check_order(_links(made))
    return _with_rate(_links(made), learning_rate if made is optimizer else None)


def instance(optimizer: Any, learning_rate: Any) -> Any:
    """Return the `Optimizer` or the transformation that is meant; arguments as of `resolve`."""
    if isinstance(optimizer, str):
        known = {**_KERAS, **OPTIMIZER_CLS_NAMES}
        check_choice("optimizer", optimizer, sorted(known))
        return known[optimizer](_required(learning_rate, f"a name ({optimizer!r})"))
    if isinstance(optimizer, type):
        if not issubclass(optimizer, Optimizer):
            raise InvalidType(f"`optimizer` {_KINDS} {received('optimizer', optimizer)}")
        return _call(optimizer, _required(learning_rate, f"a class ({optimizer.__name__})"))
    if isinstance(optimizer, Optimizer):
        _refused(learning_rate, optimizer)
        return optimizer
    if is_transformation(optimizer):
        return optimizer
    if callable(optimizer):
        made = _call(optimizer, *(() if learning_rate is None else (learning_rate,)))
        if not is_transformation(made):
            raise InvalidType(
                "`optimizer` as a function must return an `Optimizer`, a chain, a link or an optax "
                f"transformation. Received: {made!r}."
            )
        return made
    raise InvalidType(f"`optimizer` {_KINDS} {received('optimizer', optimizer)}")


# Where TensorFlow 1 and Keras share a name, contrib's meaning is the one of `optimize_loss`.
_KERAS = {name: CLASSES[name] for name in names() if not name.endswith("Optimizer")}

_KINDS = (
    "must be a name, a subclass of `Optimizer`, a function of the learning rate, an `Optimizer`, "
    "a chain, a link, or an optax transformation."
)


def _required(learning_rate: Any, kind: str) -> Any:
    if learning_rate is None:
        raise ValueError(f"`learning_rate` must be given when `optimizer` is {kind}.")
    return learning_rate


def _refused(learning_rate: Any, optimizer: Any) -> None:
    if learning_rate is not None:
        raise ValueError(
            "`learning_rate` must be None when `optimizer` brings its own. "
            f"Received: learning_rate={learning_rate!r}, optimizer={optimizer!r}."
        )


def _call(function: Callable[..., Any], *args: Any) -> Any:
    wanted = "the learning rate alone" if args else "no argument, as there is no learning rate"
    check_takes(f"`optimizer` must take {wanted}.", function, *args)
    return function(*args)


def _links(made: Any) -> dict[str, Any]:
    if isinstance(made, Optimizer):
        # With the numbers as they are now: the rate may have been set after the chain was built.
        return {**dict(made.chain.links), **made._links_behind_aggregation()}
    if isinstance(made, Chain):
        if made.precision is not None:
            raise ValueError(
                "`optimizer` must be a chain without a precision, as other links join it: give "
                f"`precision` to `optimize_loss` instead. Received: {made.precision}."
            )
        return dict(made.links)
    return {"rule" if isinstance(made, Link) else "optimizer": made}


def _check_order(links: dict[str, Any]) -> None:
    """Raise if the rate comes before a rule that gives gradients of any size the same update."""
    rate = rule = None
    for name, link in linked(links):
        if has_rate(link) or not isinstance(link, Link):
            rate, rule = name if isinstance(link, Link) else None, None
        elif _normalizes(link):
            rule = name
    if rate and rule:
        raise ValueError(
            f"`optimizer` must have the link {rate!r} after {rule!r}, whose updates do not depend "
            "on the size of the gradients: before it, the rate has no effect. Write "
            f"`chain({rule}=..., {rate}=...)`. Received: {[*links]}."
        )


def _normalizes(link: Any) -> bool:
    """Return whether a rule's updates are the same for larger gradients."""
    kinds = (ScaleByAdamax, ScaleByLion, ScaleByMuon)
    return isinstance(link, Link) and (bool(link.squares) or isinstance(link, kinds))


def _check_rate(links: dict[str, Any], learning_rate: Any) -> None:
    """Raise unless there is one learning rate: in the links, or the one that is given."""
    ours = [link for _, link in linked(links) if isinstance(link, Link)]
    has_one = any(map(has_rate, ours))
    if learning_rate is None:
        if not has_one and len(ours) == len(links):
            raise ValueError(
                "`learning_rate` must be given: no link of `optimizer` has one, and without it the "
                f"loss would rise. Received: optimizer={links}."
            )
    elif len(ours) < len(links):
        raise ValueError(
            "`learning_rate` must be None when `optimizer` contains an optax transformation: that "
            "must contain the rate, as optax.adam(0.1) does, or be in a chain with a "
            "`rate=ScaleByLearningRate(...)` of its own. "
            f"{received('learning_rate', learning_rate)}"
        )
    elif has_one:
        _refused(learning_rate, links)


def _with_rate(links: dict[str, Any], learning_rate: Any) -> dict[str, Any]:
    """Return the links, with the learning rate behind the rule where none has one."""
    _check_rate(links, learning_rate)
    if learning_rate is None:
        return links
    name = different_names([*links, "rate"])[-1]  # `rate`, unless another link has this name
    rate = {name: ScaleByLearningRate(learning_rate)}
    return arranged(links, rate)
