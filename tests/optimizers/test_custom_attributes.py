"""Custom optimizers in files and copies: their numbers are state, their attributes structure."""

import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.optimizers.custom_ways import (
    CLASSES,
    NAMES,
    OPTIONS,
    SOME,
    Plain,
    assert_close,
    custom,
    gradients,
    in_steps,
    pairs,
    params,
    through_apply,
    through_update,
    through_variables,
    variables,
    wanted,
)


def assert_equal(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# Saving, configurations, copies.


@pytest.mark.parametrize("cls", CLASSES)
def test_a_restored_optimizer_takes_the_same_next_step(cls):
    check_restored(cls, "plain")


@pytest.mark.parametrize("cls", SOME)
def test_a_restored_optimizer_with_options_takes_the_same_next_step(cls):
    check_restored(cls, "adorned-around")


def check_restored(cls, kind):
    optimizer = cls(**{**custom.OPTIONS[cls], **OPTIONS[kind]})
    config = json.loads(json.dumps(optimizer.get_config()))
    *first, last = gradients()
    made = variables(params())
    for g in first:
        optimizer.apply_gradients(pairs(g, made))
    store = {}
    optimizer.save_own_variables(store)

    fresh = cls.from_config(config)
    assert fresh.get_config() == optimizer.get_config()
    copies = variables(jax.tree.unflatten(jax.tree.structure(params()), [v.value for v in made]))
    fresh.build(copies)
    fresh.load_own_variables(store)
    assert int(fresh.iterations) == int(optimizer.iterations)
    optimizer.apply_gradients(pairs(last, made))
    fresh.apply_gradients(pairs(last, copies))
    assert_equal([v.value for v in copies], [v.value for v in made])
    assert_equal([v.value for v in fresh.variables], [v.value for v in optimizer.variables])


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_go_on_alike_and_apart(cls):
    optimizer, made = cls(**custom.OPTIONS[cls]), variables(params())
    first, second, third, _ = gradients()
    optimizer.apply_gradients(pairs(first, made))
    other, copies = pickle.loads(pickle.dumps((optimizer, made)))
    optimizer.apply_gradients(pairs(second, made))
    other.apply_gradients(pairs(second, copies))
    assert_equal([v.value for v in copies], [v.value for v in made])
    with pytest.raises(ValueError, match="is not one of those that the optimizer was built with"):
        other.apply_gradients(pairs(third, made))
    unbuilt = pickle.loads(pickle.dumps(cls(**custom.OPTIONS[cls])))
    assert_equal(through_apply(unbuilt, params(), gradients())[1], _tree_of(made))


def _tree_of(made):
    return jax.tree.unflatten(jax.tree.structure(params()), [v.value for v in made])


@pytest.mark.parametrize("cls", CLASSES)
def test_equal_options_make_equal_chains(cls):
    """A state goes on in a step made from another optimizer of the same options."""
    first, second = (cls(**custom.OPTIONS[cls]) for _ in range(2))
    assert first.chain == second.chain
    assert hash(first.chain) == hash(second.chain)
    assert pickle.loads(pickle.dumps(first.chain)) == first.chain
    assert cls(**{**custom.OPTIONS[cls], "learning_rate": 0.01}).chain != first.chain
    assert cls.__name__ in repr(first) or cls is custom.WarmSGD


# Numbers change without a trace; attributes change the program.


class Counting(custom.MomentumSGD):
    traces = 0

    def update_step(self, gradient, variable):
        if variable.name == NAMES[0]:
            Counting.traces += 1
        super().update_step(gradient, variable)


def traces_of(function):
    before = Counting.traces
    function()
    return Counting.traces - before


def test_a_rate_is_a_number_and_an_attribute_is_not():
    optimizer, made = Counting(0.1, 0.75), variables(params())
    grads = gradients()

    def step():
        optimizer.apply_gradients(pairs(grads[0], made))

    assert traces_of(step) == 1
    optimizer.learning_rate = 0.2
    assert traces_of(step) == 0
    optimizer.learning_rate.assign(0.3)
    assert traces_of(step) == 0
    optimizer.momentum = 0.75
    assert traces_of(step) == 0
    optimizer.momentum = 0.5
    assert traces_of(step) == 1
    assert traces_of(step) == 0


@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_attribute_set_after_build_takes_effect(jit_compile):
    optimizer = custom.MomentumSGD(0.1, momentum=0.9, jit_compile=jit_compile)
    made = variables(params())
    optimizer.build(made)
    optimizer.momentum = 0.75  # before the first step
    for g in gradients():
        optimizer.apply_gradients(pairs(g, made))
    assert_close(_tree_of(made), wanted(custom.MomentumSGD, "plain")[-1])
    optimizer.momentum = 0.0  # and after it
    before = _tree_of(made)
    optimizer.apply_gradients(pairs(gradients()[0], made))
    moved = jax.tree.map(lambda p, g: p - np.float32(0.1) * g, before, gradients()[0])
    assert_close(_tree_of(made), moved)
    assert optimizer.get_config()["momentum"] == 0.0


def test_an_attribute_takes_effect_inside_other_optimizers():
    inner = custom.MomentumSGD(0.1, momentum=0.9)
    multi = ol.optimizers.MultiOptimizer({"**": inner})
    made = variables(params())
    multi.build(made)
    inner.momentum = 0.75
    for g in gradients():
        multi.apply_gradients(pairs(g, made))
    assert_close(_tree_of(made), wanted(custom.MomentumSGD, "plain")[-1])


def test_an_attribute_set_before_build_reaches_functions():
    optimizer = custom.MomentumSGD(0.1, momentum=0.9)
    assert optimizer.chain.init(params())
    optimizer.momentum = 0.75
    expected = wanted(custom.MomentumSGD, "plain")
    assert_close(in_steps(optimizer, params(), gradients()), expected)
    assert_close(through_update(optimizer, params(), gradients()), expected)


class WithOrWithout(custom.MomentumSGD):
    """Which variables it has depends on an attribute."""

    def build(self, var_list):
        super().build(var_list)
        if self.momentum > 0.8:
            self.extra = self.add_variable(name="extra")


def test_an_attribute_that_would_change_the_variables_is_refused():
    optimizer, made = WithOrWithout(0.1, 0.5), variables(params())
    grads = gradients()
    optimizer.apply_gradients(pairs(grads[0], made))
    with pytest.raises(ValueError, match=r"only its numbers.*must make the variables of before"):
        optimizer.momentum = 0.9
    assert optimizer.momentum == 0.5
    other, copies = WithOrWithout(0.1, 0.5), variables(params())
    for g in grads:
        other.apply_gradients(pairs(g, copies))
    for g in grads[1:]:
        optimizer.apply_gradients(pairs(g, made))
    assert_equal(_tree_of(made), _tree_of(copies))


def test_variables_in_attributes_are_assigned_to_and_not_replaced():
    optimizer = custom.MomentumSGD(0.1)
    optimizer.build(variables(params()))
    with pytest.raises(ValueError, match=r"`momentums` must stay: it has variables.*`assign`"):
        optimizer.momentums = []
    assert len(optimizer.momentums) == 3
    optimizer._note = "private attributes can be added at any time"


def test_declared_options_may_do_without_a_rate():
    class Shift(ol.optimizers.Optimizer):
        learning_rate: Any = None
        by: float = 1.0

        def update_step(self, gradient, variable):
            variable.assign_sub(self.by * jnp.sign(gradient))

    p, g = {"w": jnp.float32(1.0)}, {"w": jnp.float32(3.0)}
    assert float(Shift(by=0.5).apply(g, p)["w"]) == 0.5
    assert repr(Shift(by=0.5)) == "Shift(by=0.5)"
    assert "learning_rate" not in Shift(by=0.5).get_config()
    assert repr(Shift.from_config(Shift(by=0.5).get_config())) == "Shift(name='Shift', by=0.5)"
    assert float(Shift(learning_rate=0.5).learning_rate) == 0.5
    with pytest.raises(ValueError, match="Shift has no learning rate"):
        _ = Shift().learning_rate
    with pytest.raises(ValueError, match="`by` must be a finite number"):
        Shift(by=float("nan"))


def test_the_more_derived_of_links_and_update_step_counts():
    class Doubled(ol.optimizers.SGD):
        def update_step(self, gradient, variable):
            variable.assign_sub(2 * jnp.asarray(self.learning_rate, variable.dtype) * gradient)

    class Plainly(Doubled):
        def links(self):
            return {"rate": ol.transforms.ScaleByLearningRate(self.rate)}

    p, g = {"w": jnp.float32(1.0)}, {"w": jnp.float32(1.0)}
    assert float(Doubled(0.25).apply(g, p)["w"]) == 0.5
    assert float(Plainly(0.25).apply(g, p)["w"]) == 0.75


@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_attribute_may_be_a_method_of_the_optimizer(jit_compile):
    class Chosen(custom.MomentumSGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._rule_of_choice = self._with_momentum

        def update_step(self, gradient, variable):
            self._rule_of_choice(gradient, variable)

        def _with_momentum(self, gradient, variable):
            super().update_step(gradient, variable)

    options = {**custom.OPTIONS[custom.MomentumSGD], "jit_compile": jit_compile}
    seen = through_variables(Chosen(**options), params(), gradients())
    assert_close(seen, wanted(custom.MomentumSGD, "plain"))
    assert Chosen(**options).chain == Chosen(**options).chain


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_function_of_another_optimizer_is_loud(jit_compile):
    class Borrowing(Plain):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.count = lambda: self.calls.assign_add(1.0)

        def build(self, var_list):
            super().build(var_list)
            self.calls = self.add_variable(name="calls")

        def update_step(self, gradient, variable):
            self.count()

    optimizer, v = Borrowing(jit_compile=jit_compile), ol.Variable(1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"was made outside|that it is called on, `self`"):
            optimizer.apply_gradients([(1.0, v)])
    assert not optimizer.built


def test_the_rate_may_have_any_name_and_other_options_stay():
    class Named(ol.optimizers.Optimizer):
        def build(self, variables):
            super().build(variables)

        def update_step(self, gradient, variable, lr):
            variable.assign_sub(lr * gradient)

    class Doubling(ol.optimizers.Optimizer):
        def update_step(self, gradient, variable, scale=2.0):
            variable.assign_sub(scale * gradient)

    p, g = {"w": jnp.float32(1.0)}, {"w": jnp.float32(0.25)}
    assert float(Named(learning_rate=0.5).apply(g, p)["w"]) == 0.875
    assert float(Doubling(learning_rate=0.5).apply(g, p)["w"]) == 0.5
    Named(learning_rate=0.5).build(variables=[ol.Variable(1.0)])


def test_values_decide_in_python_where_nothing_is_compiled():
    class Deciding(Plain):
        def update_step(self, gradient, variable):
            if jnp.sum(gradient) > 0:
                super().update_step(gradient, variable)

    p, g = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    assert Deciding(0.5, jit_compile=False).apply(g, p)["w"].tolist() == [0.5, 0.5]
    with pytest.raises(jax.errors.TracerBoolConversionError):
        Deciding(0.5).apply(g, p)


def test_float16_is_computed_in_float32_and_stored_as_it_is():
    cls = custom.GuardedAdam
    optimizer = cls(**custom.OPTIONS[cls])
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    seen = through_variables(optimizer, p, gradients())
    assert {v.dtype for v in optimizer.variables[1:]} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(seen)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), seen), wanted(cls, "plain"), rtol=0.1
    )
