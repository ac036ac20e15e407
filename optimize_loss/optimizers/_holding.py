"""What an optimizer keeps between calls, and what follows when an option changes."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optimize_loss._checks import InvalidType, nearest, nearest_option, received
from optimize_loss._names import Pattern
from optimize_loss.optimizers._held import Held
from optimize_loss.optimizers._options import Options, options_of
from optimize_loss.optimizers._update_step import (
    INTERNAL,
    Recipe,
    UpdateStep,
    as_a_whole,
    has_variables,
    tracked,
)
from optimize_loss.optimizers._variable import Variable, check_variables, different_names
from optimize_loss.transforms import Chain, Link


class Holding(Options):
    """Options with a state, which `build` makes; see `Optimizer`."""

    built = False
    _is_worker = False

    def __init_subclass__(cls):
        """Let a `build` of a subclass run as a whole or not at all."""
        super().__init_subclass__()
        if "build" in vars(cls):
            cls.build = as_a_whole(cls.build)

    def __post_init__(self):
        self._start()
        super().__post_init__()

    def _start(self) -> None:
        """Begin without variables."""
        self._iterations = Variable(jnp.int32(0), "iteration")
        self._variables: list[Variable] = []
        self._given: list[Variable] = []
        self._excluded: tuple[Pattern | Variable, ...] = ()
        self._unbuilt: dict[str, Any] | None = None
        self._building = False
        self._set_later: list[str] = []
        self._outers: list[Holding] = []
        self._held: Held | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option or an attribute; raise, and change nothing, if the variables forbid it."""
        own = self.__dict__
        if self._is_closed:
            self._check_settable(name)
        settled_elsewhere = name in INTERNAL or isinstance(self._of_class(name), property)
        if settled_elsewhere or name == "learning_rate" or "_held" not in own or self._building:
            super().__setattr__(name, value)
            return
        if isinstance(value, Tracer):
            self._check_trace([value])
        if self.built and name == "mesh" and value != self.mesh:
            raise ValueError("`mesh` must be set before the optimizer is built.")
        if self.built and has_variables(own.get(name)):
            raise ValueError(
                f"`{name}` must stay: it has variables of the optimizer. Give them other values "
                f"with `assign`. {received(name, value)}"
            )
        before = {n: own[n] for n in (name,) if n in own}, list(self._set_later)
        super().__setattr__(name, value)
        if self._unbuilt is not None and name not in self._set_later:
            self._set_later.append(name)
        try:
            self._chain_changed()
        except Exception:
            del own[name]
            own.update(before[0])
            self._set_later = before[1]
            self._chain_changed()
            raise

    def __delattr__(self, name: str) -> None:
        """Delete an attribute; raise where the optimizer is complete, which needs all it has."""
        if self._is_closed and name in (*self.__dict__, *options_of(type(self))):
            raise AttributeError(
                f"`{name}` must stay, as the state was made with it. Assign another value; None "
                "where an option may be absent."
            )
        super().__delattr__(name)

    @property
    def _is_closed(self) -> bool:
        """Whether no more attributes may come: neither `__init__` nor `build` is running."""
        return bool(self.__dict__.get("_complete")) and not self._building

    def _of_class(self, name: str) -> Any:
        return getattr(type(self), name, None)

    def _check_settable(self, name: str) -> None:
        """Raise an `AttributeError` if to set this attribute would do nothing, or harm."""
        cls, own, there = type(self), self.__dict__, self._of_class(name)
        read_only = isinstance(there, property) and there.fset is None
        if name == "built" or read_only or name in self._given_at_first:
            raise AttributeError(f"`{name}` of {cls.__name__} can be read, and not be set.")
        known = [n for n in (*options_of(cls), *own) if not n.startswith("_")]
        if name not in (*known, *dir(cls)) and not name.startswith("_"):
            raise AttributeError(
                f"`{name}` must be an attribute of {cls.__name__}, and is none. Nearest: "
                f"{nearest_option(name, known)!r}. New attributes are set in `__init__` or `build` "
                "of a subclass."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes; variables have other keys wherever this is loaded."""
        state = {name: x for name, x in vars(self).items() if name != "_index_dict"}
        if "_name_dict" in state:
            state["_name_dict"] = [self._name_dict[self._var_key(v)] for v in self._given]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_name_dict" in state:
            self._know(state["_name_dict"])

    # What the rule is.

    def _rule(self) -> dict[str, Any]:
        """Return the links, or the `update_step` where a subclass defines that above them."""
        first = next(c for c in type(self).__mro__ if {"links", "update_step"} & vars(c).keys())
        if first is Holding or "links" in vars(first):
            return self.links()
        return {"update_step": UpdateStep(self._recipe(), self.rate)}

    def _recipe(self) -> Recipe:
        """Return the class and the attributes before `build`, with those set after it."""
        own = vars(self)
        later = {name: own[name] for name in self._set_later}
        attributes = own if self._unbuilt is None else {**self._unbuilt, **later}
        return Recipe.of(self, attributes)

    def update_step(self, gradient: jax.Array, variable: Variable) -> None:
        """Update one variable and what belongs to it, in place; for subclasses to define.

        It may take `learning_rate` as a third parameter, as in Keras 3.

        Args:
          gradient: its gradient, after clipping.
          variable: a box around its value, after weight decay.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is made of links and has no `update_step` to call. To change "
            "what it does, add links of your own to those that `links` returns."
        )

    def _update_step(self, gradient: jax.Array, variable: Variable) -> None:
        """Call `update_step`, also where it takes the rate, as in Keras 3."""
        third = list(inspect.signature(self.update_step).parameters.values())[2:3]
        wants_rate = any(p.name == "learning_rate" or p.default is p.empty for p in third)
        positional = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in third)
        rate = (self.learning_rate,) if wants_rate and positional else ()
        self.update_step(gradient, variable, *rate)

    def _own_boxes(self) -> list[Variable]:
        """Return the variables that are not part of the rule's state."""
        rate = self.__dict__.get("_learning_rate")
        excluded = [x for x in self._excluded if isinstance(x, Variable)]
        boxes = [self._iterations, *self._given, *excluded]
        return [*boxes, rate] if isinstance(rate, Variable) else boxes

    def _rates(self) -> dict[str, Variable]:
        """Return the variables of learning rates, by the names of their numbers in the state."""
        kept = self.__dict__.get("_learning_rate")
        names = [n for n, _ in self.chain.links if "learning_rate" in _numbers(self.chain, n)]
        return {f"{n}/learning_rate": kept for n in names if isinstance(kept, Variable)}

    # Building.

    @as_a_whole
    def build(self, var_list: Iterable[Any]) -> None:
        """Make the optimizer's variables. Subclasses with an `update_step` extend it.

        Such a subclass calls `super().build(var_list)` first, then `add_variable` or
        `add_variable_from_reference`. Building a second time does nothing.

        Args:
          var_list: the variables to be trained.
        """
        self._given = check_variables(var_list)
        self._check_trace([v.value for v in self._given])
        self._know(different_names([v.name for v in self._given]))
        self.built = True
        self._chain_changed()  # variables that are not decayed have their names now

    def _know(self, names: Sequence[str]) -> None:
        """Note the names and the places of the variables that the optimizer was built with."""
        keys = [self._var_key(v) for v in self._given]
        self._index_dict = {key: i for i, key in enumerate(keys)}
        self._name_dict = dict(zip(keys, names, strict=True))

    def _hold(self) -> Held:
        """Return the state in boxes, made when it is first needed."""
        if self._held is None:
            params = {self._name_of(v): v.value for v in self._given}
            rule = self._summed_chain
            inside = (
                "update_step/"
                if isinstance(dict(rule.links).get("update_step"), UpdateStep)
                else ""
            )
            boxes = {f"{inside}{name}": box for name, box in tracked(self).items()}
            boxes |= {**self._rates(), "step": self._iterations}
            self._held = Held(rule, params, boxes, self.mesh)
        return self._held

    def _check_trace(self, values: Iterable[Any]) -> None:
        """Raise if the optimizer was made outside of the transformation that uses it."""
        if self._iterations.is_elsewhere(*values):
            raise InvalidType(
                "An optimizer that is made outside of a JAX transformation (jit, grad, vmap, scan) "
                "cannot keep what is traced inside. Make it inside, or use its functions `init` "
                f"and `update`. Received: {self!r}."
            )

    def _forget_variables(self) -> None:
        """Keep the state alone, where the caller keeps the parameters."""
        self._hold()
        self._given = []
        self._know([])

    def _require_built(self, method: str) -> Held:
        if not self.built:
            raise ValueError(
                f"`{method}` needs the optimizer's variables: call `build(var_list)` first, or "
                "apply gradients."
            )
        return self._hold()

    def _exclude(self) -> tuple[Pattern, ...]:
        known = [x.__dict__.get("_name_dict", {}) for x in (self, *self._outers)]
        names = {key: name for names in known for key, name in names.items()}
        return tuple(
            names.get(self._var_key(x), x.name) if isinstance(x, Variable) else x
            for x in self._excluded
        )

    def _chain_changed(self) -> None:
        """Make the chain anew after something in it has changed, if it was made."""
        if self.__dict__.pop("_kept_chains", None) is not None:
            _ = self.chain
        if self._held is not None:
            try:
                self._held.renew(self._summed_chain)
            except ValueError as error:
                raise ValueError(
                    "Once an optimizer is built, only its numbers can be changed. " + str(error)
                ) from error
        for outer in self._outers:
            outer._chain_changed()

    def _var_key(self, variable: Variable) -> str:
        """Return what tells one variable from all others."""
        return variable._unique_id

    def _get_variable_index(self, variable: Variable) -> int:
        """Return the place of a variable in the list that the optimizer was built with."""
        self._name_of(variable)
        return self._index_dict[self._var_key(variable)]

    def _name_of(self, variable: Variable) -> str:
        """Return the name under which the state has a variable."""
        names = self.__dict__.get("_name_dict", {})
        if (key := self._var_key(variable)) not in names:
            advice = "Build it with all of them, or use one optimizer for each list. "
            near = f"Nearest: {nearest(variable.name, names.values())}."
            if self.built and not names:
                advice, near = "It was used with trees; use another one for variables.", ""
            raise ValueError(
                f"The variable {variable.name!r} is none of those that the optimizer was built "
                f"with. {advice}{near}"
            )
        return names[key]


def _numbers(links: Chain, name: str) -> dict[str, Any]:
    link = links.link(name)
    return link.numbers() if isinstance(link, Link) else {}
