"""Mistakes in a custom optimizer are loud, and leave no trace."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.optimizers.custom_ways import (
    NAMES,
    STEPS,
    Optimizer,
    Plain,
    assert_close,
    custom,
    gradients,
    in_steps,
    linear,
    params,
    through_apply,
    through_variables,
)


class NoSuperBuild(Plain):
    def build(self, var_list):
        self.momentums = [self.add_variable_from_reference(v, "m") for v in var_list]


class NewShape(Plain):
    def update_step(self, gradient, variable):
        variable.assign(jnp.stack([gradient, gradient]))


class NewDtype(Plain):
    def update_step(self, gradient, variable):
        variable.assign(gradient.astype(jnp.complex64))


class SlotOfOtherShape(custom.MomentumSGD):
    def update_step(self, gradient, variable):
        self.momentums[self._get_variable_index(variable)].assign(jnp.zeros(7))


class OneNameTwice(Plain):
    def build(self, var_list):
        super().build(var_list)
        for v in var_list:
            self.add_variable_from_reference(v, "m")
            self.add_variable_from_reference(v, "m")


class NoRate(Optimizer):
    def update_step(self, gradient, variable):
        variable.assign_sub(gradient * self.learning_rate)


class Counter(Plain):
    def __init__(self, learning_rate=0.1, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.t = 0

    def update_step(self, gradient, variable):
        self.t += 1
        super().update_step(gradient, variable)


class History(Counter):
    def __init__(self, learning_rate=0.1, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.seen = []

    def update_step(self, gradient, variable):
        self.seen.append(1)


class LateVariable(Plain):
    def update_step(self, gradient, variable):
        if not hasattr(self, "late"):
            self.late = ol.Variable(0.0)
        self.late.assign_add(1.0)


class OwnIterations(Plain):
    def update_step(self, gradient, variable):
        self.iterations.assign_add(1)


class OwnRate(Plain):
    def update_step(self, gradient, variable):
        self.learning_rate.assign(self.learning_rate * 0.5)


class Hidden:
    """An object that is no list and no dict."""

    count: Any


class HiddenVariable(Plain):
    def build(self, var_list):
        super().build(var_list)
        self.hidden = Hidden()
        self.hidden.count = ol.Variable(0.0)

    def update_step(self, gradient, variable):
        self.hidden.count.assign_add(1.0)


class OtherVariables(Plain):
    def build(self, var_list):
        super().build(var_list)
        self.all = list(var_list)

    def update_step(self, gradient, variable):
        self.all[1].assign_sub(gradient[:0].sum() + self.all[1])


class NoRule(Optimizer):
    pass


class SuperOfLinks(ol.optimizers.SGD):
    def update_step(self, gradient, variable):
        super().update_step(2 * gradient, variable)


INVALID, SHAPE, VALUE = ol.InvalidType, ol.TreeMismatch, ValueError
LOUD = {
    "no-super-build": (NoSuperBuild, INVALID, "`build` of NoSuperBuild must call `super().build(v"),
    "new-shape": (NewShape, SHAPE, "'w' must keep its shape (2,). Received: shape (2, 2)."),
    "new-dtype": (NewDtype, INVALID, "'w' must keep its dtype float32. Received: complex64."),
    "slot-shape": (SlotOfOtherShape, SHAPE, "'m/w' must keep its shape (2,)"),
    "one-name-twice": (OneNameTwice, VALUE, "`name` must differ from those of the optimizer's ot"),
    "no-rate": (NoRate, VALUE, "NoRate has no learning rate: give `learning_rate`, or set"),
    "attribute": (Counter, VALUE, "must not change attributes: compiled, it runs only once"),
    "list": (History, VALUE, "a new value of `seen`"),
    "late-variable": (LateVariable, VALUE, "`update_step` of LateVariable must make no variables"),
    "iterations": (OwnIterations, VALUE, "must assign only to the variable that it is given"),
    "rate": (OwnRate, VALUE, "a new value for 'learning_rate'"),
    "hidden": (HiddenVariable, VALUE, "keeps in attributes, lists and dicts of the optimizer"),
    "no-rule": (NoRule, NotImplementedError, "NoRule must define `links`, or `build` and `update_"),
    "super": (SuperOfLinks, NotImplementedError, "SuperOfLinks is made of links"),
}


@pytest.mark.parametrize("way", ["eager", "variables", "apply", "steps"])
@pytest.mark.parametrize("name", LOUD)
def test_mistakes_are_loud(name, way):
    cls, error, message = LOUD[name]
    optimizer = cls(jit_compile=way != "eager")
    p, g = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    v = ol.Variable(p["w"], "w")

    def run():
        if way == "steps":
            in_steps(optimizer, p, [g])
        elif way == "apply":
            optimizer.apply(g, p)
        else:
            optimizer.apply_gradients([(g["w"], v)])

    for _ in range(2):  # a failed call changes nothing
        with pytest.raises(error) as caught:
            run()
        assert message in str(caught.value)
        assert int(optimizer.iterations) == 0
        np.testing.assert_array_equal(v.value, p["w"])


def test_other_variables_of_the_model_are_not_assigned_to():
    optimizer = OtherVariables()
    v, w = (ol.Variable([1.0], name) for name in "vw")
    optimizer.build([v, w])
    with pytest.raises(ValueError, match="a new value for 'w'"):
        optimizer.apply_gradients([(jnp.ones(1), v)])
    optimizer.apply_gradients([(jnp.ones(1), v), (jnp.ones(1), w)])
    assert (float(v[0]), float(w[0])) == (1.0, 0.0)


def test_a_build_that_fails_leaves_no_trace():
    class Picky(custom.MomentumSGD):
        def build(self, var_list):
            super().build(var_list)
            if self.add_variable_from_reference(var_list[0], "x").shape != ():
                raise RuntimeError("no scalar first")

    optimizer = Picky(0.1)
    wrong, right = ol.Variable([1.0, 2.0], "w"), ol.Variable(1.0, "w")
    with pytest.raises(RuntimeError, match="no scalar first"):
        optimizer.build([wrong])
    assert not optimizer.built
    assert not hasattr(optimizer, "momentums")
    optimizer.build([right])
    assert [v.name for v in optimizer.variables] == ["iteration", "m/w", "x/w"]


def test_direct_build_without_super_is_loud():
    optimizer = NoSuperBuild()
    with pytest.raises(ol.InvalidType, match=r"must call `super\(\)\.build\(var_list\)`"):
        optimizer.build([ol.Variable(1.0)])
    assert not optimizer.built


def test_variables_are_added_in_build():
    optimizer = custom.MomentumSGD(0.1)
    optimizer.build([v := ol.Variable(1.0, "v")])
    for add in (optimizer.add_variable, lambda: optimizer.add_variable_from_reference(v, "late")):
        with pytest.raises(ValueError, match="Variables must be added in `build`"):
            add()
    assert len(optimizer.variables) == 2


def test_a_variable_added_in_the_constructor_is_kept():
    class Early(Plain):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.calls = self.add_variable(name="calls")

        def update_step(self, gradient, variable):
            self.calls.assign_add(1.0)
            super().update_step(gradient, variable)

    optimizer = Early()
    through_variables(optimizer, params(), gradients())
    assert [v.name for v in optimizer.variables] == ["iteration", "calls"]
    assert float(optimizer.calls) == STEPS * len(NAMES)
    step = ol.optimize_loss(linear, optimizer=optimizer)
    state = step.init(params())
    assert float(state.optimizer["update_step"]["calls"]) == 0.0  # functions begin anew


def test_no_rate_is_fine_where_none_is_read():
    class Fixed(Optimizer):
        def update_step(self, gradient, variable):
            variable.assign_sub(0.5 * gradient)

    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params(), gradients()[0])
    for way in (through_variables, through_apply, in_steps):
        assert_close(way(Fixed(), params(), gradients())[0], expected)
    with pytest.raises(ValueError, match="`learning_rate` must be None when `optimizer` brings"):
        ol.optimize_loss(linear, optimizer=Fixed(), learning_rate=0.1)
    with pytest.raises(ValueError, match="'weight_decay' needs the `learning_rate`"):
        Fixed(weight_decay=0.1).init(params())
