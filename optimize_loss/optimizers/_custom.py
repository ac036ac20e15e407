"""A rule written as `build` and `update_step`, as a link."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from optimize_loss.optimizers._variable import Variable
from optimize_loss.transforms import NotNegative, TreeLink

if TYPE_CHECKING:
    from optimize_loss.optimizers._stateful import Stateful


@dataclasses.dataclass(frozen=True)
class UpdateStep(TreeLink):
    """Run the `update_step` of an optimizer for every parameter, as a pure function.

    For every trace, a fresh copy of the optimizer is built on boxes around the parameters; its
    variables are given the state, and what the boxes contain afterwards is the new state. The
    optimizer itself is not touched.

    Args:
      optimizer: whose class defines `build` and `update_step`.
      learning_rate: its rate; None if it has none.
    """

    optimizer: Any  # a `Stateful`
    learning_rate: NotNegative | None

    def init(self, params):
        """Return the values of the variables that `build` makes, by name."""
        worker, _ = self._built(params, self.optimizer.iterations.value, None)
        return {name: box.value for name, box in tracked(worker).items()}

    def scalars(self, numbers, memory, total, step):
        """Return the rate and the step."""
        return {**numbers, "step": step}, memory

    def run(self, updates, slots, params, k):
        """Return what the boxes gained, and the new values of the variables."""
        worker, boxes = self._built(params, k["step"], k.get("learning_rate"))
        variables = tracked(worker)
        for name, box in variables.items():
            box.assign(slots[name])
        for name, update in updates.items():
            worker._update_step(update, boxes[name])
        new = {name: boxes[name].value - params[name] for name in updates}
        return new, {name: box.value for name, box in variables.items()}

    def _built(
        self, params: Mapping[str, jax.Array], step: jax.Array, rate: jax.Array | None
    ) -> tuple["Stateful", dict[str, Variable]]:
        boxes = {name: Variable(p, name) for name, p in params.items()}
        worker = self.optimizer._worker(step, rate)
        worker.build(list(boxes.values()))
        return worker, boxes


def tracked(optimizer: "Stateful") -> dict[str, Variable]:
    """Return the variables of a built optimizer: those added, and those it merely has.

    A variable that is only an attribute is kept under the attribute's name: nothing that an
    `update_step` assigns to is lost between steps.
    """
    added = {box.name: box for box in optimizer._variables}
    known = {id(box) for box in (*added.values(), *optimizer._own_boxes())}
    for name, value in vars(optimizer).items():
        for path, box in _boxes(name, value):
            if id(box) not in known:
                known.add(id(box))
                added[path] = box
    return added


def _boxes(name: str, value: Any) -> Iterator[tuple[str, Variable]]:
    """Return the variables in an attribute and in the lists and dicts there, by name."""
    if isinstance(value, Variable):
        yield name, value
    elif isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inside in items:
            yield from _boxes(f"{name}/{key}", inside)
