"""Custom optimizers, written as for Keras, move parameters alike however they are used.

The classes are in `custom_optimizers.py`. What each does is checked against its formula in numpy;
all other ways to run one are checked against the plainest, which is not compiled.
"""

import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from tests.cases import on_eight_devices, random_like
from tests.optimizers import custom_optimizers

SHAPES = {"dense": {"bias": (), "kernel": (8, 2)}, "scale": ()}
NAMES = ["dense/bias", "dense/kernel", "scale"]
STEPS = 4
SCALE = 8.0
# For type checkers a subclass has the constructor of its own fields, and not its parent's.
custom: Any = custom_optimizers
Optimizer: Any = ol.optimizers.Optimizer
CLASSES = [pytest.param(cls, id=cls.__name__) for cls in custom.OPTIONS]
SOME = CLASSES[4:5]  # where options around the rule are tried too, as these do not depend on it

ADORNED = {
    "weight_decay": 0.1,
    "global_clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 2,
    "learning_rate": ol.schedules.ExponentialDecay(0.1, 2, 0.5),
}
AROUND = {"gradient_accumulation_steps": 2, "loss_scale_factor": SCALE}
OPTIONS = {"plain": {}, "adorned": ADORNED, "adorned-around": {**ADORNED, **AROUND}}


def params(seed=0):
    return random_like(SHAPES, seed)


def gradients(seed=1):
    return [random_like(SHAPES, seed + t) for t in range(STEPS)]


def by_name(tree):
    return dict(zip(NAMES, jax.tree.leaves(tree), strict=True))


def scaled(grads, optimizer):
    """Return what one gets by hand: gradients of the scaled loss."""
    return jax.tree.map(lambda g: optimizer.scale_loss(g), grads)


def variables(tree):
    return [ol.Variable(p, name) for name, p in by_name(tree).items()]


def pairs(grads, made):
    return list(zip(jax.tree.leaves(grads, is_leaf=lambda x: x is None), made, strict=True))


def assert_close(got, wanted, rtol=2e-6):
    def close(a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=rtol / 10)

    jax.tree.map(close, got, wanted)


def assert_equal(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# The ways to use an optimizer: each returns the parameters after every step.


def through_variables(optimizer, p, grads):
    made, seen = variables(p), []
    for g in grads:
        optimizer.apply_gradients(pairs(scaled(g, optimizer), made))
        seen.append(jax.tree.unflatten(jax.tree.structure(p), [v.value for v in made]))
    return seen


def through_apply(optimizer, p, grads):
    seen = []
    for g in grads:
        p = optimizer.apply(scaled(g, optimizer), p)
        seen.append(p)
    return seen


def through_update(optimizer, p, grads):
    state, seen = optimizer.init(p), []
    for g in grads:
        updates, state = jax.jit(optimizer.update)(scaled(g, optimizer), state, p)
        p = optax.apply_updates(p, updates)
        seen.append(p)
    return seen


def under_vmap(optimizer, p, grads):
    def stack(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    others = gradients(7)
    p, seen = stack(p, params(9)), []
    state = jax.vmap(optimizer.init)(p)
    for g, other in zip(grads, others, strict=True):
        g = stack(scaled(g, optimizer), other)
        updates, state = jax.jit(jax.vmap(optimizer.update))(g, state, p)
        p = optax.apply_updates(p, updates)
        seen.append(jax.tree.map(lambda x: x[0], p))
    return seen


def linear(p, g):
    """A loss whose gradient is `g`."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), p, g)))


def in_steps(optimizer, p, grads):
    step = ol.optimize_loss(linear, optimizer=optimizer)
    state, seen = step.init(p), []
    for g in grads:
        state, _ = step(state, g)
        seen.append(jax.tree.map(jnp.copy, state.params))
    return seen


def in_many(optimizer, p, grads):
    step = ol.optimize_loss(linear, optimizer=optimizer)
    state, seen = step.init(p), []
    for t in range(0, len(grads), 2):
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads[t : t + 2])
        state, _ = step.many(state, both)
        seen += [None, jax.tree.map(jnp.copy, state.params)]
    return seen


WAYS = {
    "variables": through_variables,
    "apply": through_apply,
    "update": through_update,
    "vmap": under_vmap,
    "steps": in_steps,
    "many": in_many,
}


def plainest(cls, options):
    """Return what every other way must give: variables, and nothing compiled as a whole."""
    return through_variables(cls(**options, jit_compile=False), params(), gradients())


_PLAINEST: dict[Any, Any] = {}


def wanted(cls, kind):
    if (cls, kind) not in _PLAINEST:
        _PLAINEST[cls, kind] = plainest(cls, {**custom.OPTIONS[cls], **OPTIONS[kind]})
    return _PLAINEST[cls, kind]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_all_ways_agree(cls, way):
    check_way(cls, "plain", way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", SOME)
def test_all_ways_agree_with_options_around(cls, way):
    check_way(cls, "adorned-around", way)


def kept(optimizer):
    """Return all attributes, and what the optimizer keeps, but for the chains made of them."""
    held = {n: x for n, x in vars(optimizer._held).items() if n != "chains"}
    return {n: x for n, x in vars(optimizer).items() if n != "_held"} | {"_held": held}


def check_way(cls, kind, way):
    optimizer = cls(**{**custom.OPTIONS[cls], **OPTIONS[kind]})
    before = kept(optimizer)
    seen = WAYS[way](optimizer, params(), gradients())
    if way not in ("variables", "apply"):  # functions, which leave the optimizer as it is
        assert kept(optimizer) == before
        assert optimizer.variables == [optimizer.iterations]
    for got, expected in zip(seen, wanted(cls, kind), strict=True):
        if got is not None:
            assert_close(got, expected)
    assert jax.tree.map(jnp.shape, seen[-1]) == jax.tree.map(jnp.shape, params())


@pytest.mark.parametrize("cls", CLASSES)
def test_inside_another_optimizer(cls):
    multi = ol.optimizers.MultiOptimizer({"**": cls(**custom.OPTIONS[cls])})
    assert_close(through_variables(multi, params(), gradients()), wanted(cls, "plain"))


@pytest.mark.parametrize("cls", SOME)
def test_inside_other_optimizers_with_options(cls):
    expected = wanted(cls, "adorned-around")
    inner = cls(**{**custom.OPTIONS[cls], **ADORNED})
    multi = ol.optimizers.MultiOptimizer({"**": inner}, **AROUND)
    assert_close(through_variables(multi, params(), gradients()), expected)
    assert_close(in_steps(multi, params(), gradients()), expected)

    inner = cls(**{**custom.OPTIONS[cls], **ADORNED})
    dynamic = ol.optimizers.LossScaleOptimizer(inner, initial_scale=SCALE)
    expected = wanted(cls, "adorned")
    assert_close(through_variables(dynamic, params(), gradients()), expected)
    assert_close(in_steps(dynamic, params(), gradients()), expected)


def test_a_custom_optimizer_for_some_of_the_parameters():
    cls = custom.MomentumSGD
    mine, theirs = cls(**custom.OPTIONS[cls]), ol.optimizers.SGD(0.5)
    multi = ol.optimizers.MultiOptimizer({"**/bias|scale": mine}, default_optimizer=theirs)
    seen = through_variables(multi, params(), gradients())
    alone = wanted(cls, "plain")
    other = through_variables(ol.optimizers.SGD(0.5), params(), gradients())
    for got, a, b in zip(seen, alone, other, strict=True):
        expected = {"dense": {"bias": a["dense"]["bias"], "kernel": b["dense"]["kernel"]}}
        assert_close(got, {**expected, "scale": a["scale"]})


# What each of them does, in numpy.


def formula(cls, name, t, p, g, m, o, shared):
    """Return the new parameter; `m` keeps what is its own, `shared` what is everybody's."""
    lr = o["learning_rate"]
    if cls in (custom.MomentumSGD, custom.WarmSGD):
        momentum = o["momentum"] if "momentum" in o else 0.5 ** (1 / o["half_life"])
        m["m"] = momentum * m.get("m", 0) - lr * g
        return p + m["m"]
    if cls is custom.GuardedAdam:
        b1, b2 = o["beta_1"], o["beta_2"]
        m["m"] = b1 * m.get("m", 0) + (1 - b1) * g
        m["v"] = b2 * m.get("v", 0) + (1 - b2) * g * g
        alpha = lr * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        return p - alpha * m["m"] / (np.sqrt(m["v"]) + o["epsilon"])
    if cls is custom.DecayingMomentum:
        m["m"] = o["beta"] ** (t + 1) * m.get("m", 0) + g
        return p - lr * m["m"]
    if cls is custom.GlobalAdagrad:
        shared["total"] = shared.get("total", 1) + np.sum(g * g)
        return p - lr * g / np.sqrt(shared["total"])
    if cls is custom.RMSInDict:
        m["square"] = o["rho"] * m.get("square", 0) + (1 - o["rho"]) * g * g
        last, m["last"] = m.get("last", 0), g / (np.sqrt(m["square"]) + 1e-3)
        return p - lr * (m["last"] + 0.5 * last)
    if cls is custom.Anchored:
        g = g + o["pull"] * (p - m.setdefault("anchor", p))
        m["sum"] = m.get("sum", o["start"]) + g * g
        return p - lr * g / np.sqrt(m["sum"])
    if cls is custom.Keras3RMS:
        m["velocity"] = o["rho"] * m.get("velocity", 0) + (1 - o["rho"]) * g * g
        return p - lr * g / np.sqrt(m["velocity"] + 1e-3)
    assert cls is custom.SignSGD
    return p - np.where(np.abs(g) > o["threshold"], lr * np.sign(g), 0)


def in_numpy(cls, grads, order=NAMES):
    """Return the parameters after every step; a gradient of None leaves all as it is."""
    p = {name: np.float64(x) for name, x in by_name(params()).items()}
    memory, shared, seen = {name: {} for name in NAMES}, {}, []
    for t, g in enumerate(grads):
        for name in order:
            if g[name] is not None:
                args = p[name], np.float64(g[name]), memory[name]
                p[name] = formula(cls, name, t, *args, custom.OPTIONS[cls], shared)
        seen.append(dict(p))
    return seen


@pytest.mark.parametrize("cls", CLASSES)
def test_it_does_what_its_formula_says(cls):
    expected = in_numpy(cls, [by_name(g) for g in gradients()])
    assert_close([by_name(p) for p in wanted(cls, "plain")], expected, rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_variables_without_a_gradient_keep_their_slots_and_places(cls, jit_compile):
    """The order is that of the list, not of the names, and the second one has no gradient twice."""
    order = ["scale", "dense/kernel", "dense/bias"]
    made = {name: ol.Variable(by_name(params())[name], name) for name in order}
    optimizer = cls(**custom.OPTIONS[cls], jit_compile=jit_compile)
    optimizer.build(list(made.values()))
    assert [optimizer._get_variable_index(v) for v in made.values()] == [0, 1, 2]
    grads = [by_name(g) for g in gradients()]
    for t, g in enumerate(grads):
        if t in (0, 2):
            g["dense/kernel"] = None
            with pytest.warns(
                UserWarning, match=r"no gradient for .'dense/kernel'.: they are left"
            ):
                optimizer.apply_gradients([(g[n], v) for n, v in made.items()])
        else:
            optimizer.apply_gradients([(g[n], v) for n, v in made.items()])
    expected = in_numpy(cls, grads, order)[-1]
    assert_close({n: v.value for n, v in made.items()}, {n: expected[n] for n in made}, rtol=1e-5)
    assert int(optimizer.iterations) == STEPS


def test_pairs_may_come_in_another_order_and_not_all():
    cls = custom.MomentumSGD
    optimizer, made = cls(**custom.OPTIONS[cls]), dict(zip(NAMES, variables(params()), strict=True))
    optimizer.build(list(made.values()))
    grads = [by_name(g) for g in gradients()]
    for g in grads:
        g["dense/bias"] = None
        optimizer.apply_gradients([(g[n], made[n]) for n in ("scale", "dense/kernel")])
    expected = in_numpy(cls, grads)[-1]
    assert_close({n: v.value for n, v in made.items()}, {n: expected[n] for n in made}, rtol=1e-5)
    np.testing.assert_array_equal(optimizer.momentums[0].value, jnp.zeros(2))


# What users see: the variables that `build` makes are those of the state.


@pytest.mark.parametrize("cls", CLASSES)
def test_the_variables_show_the_state(cls):
    optimizer = cls(**custom.OPTIONS[cls])
    through_variables(optimizer, params(), gradients())
    names = [v.name for v in optimizer.variables]
    assert names[0] == "iteration"
    assert int(optimizer.variables[0]) == STEPS
    moved = [v for v in optimizer.variables[1:] if v.name not in ("rho",)]
    assert all(np.any(v.numpy() != 0) for v in moved)
    if cls is custom.GuardedAdam:
        assert names[1:] == [f"{slot}/{name}" for name in NAMES for slot in "mv"]
        assert optimizer._momentums[1] is optimizer.variables[3]
    if cls is custom.GlobalAdagrad:
        assert optimizer.calls.value.tolist() == [STEPS * len(NAMES)]
    if cls is custom.RMSInDict:
        assert [v.name for v in optimizer.variables[4:]] == ["rho"] + ["Variable"] * 3


def test_a_variable_made_in_the_constructor_is_a_number_that_can_be_assigned():
    cls = custom.RMSInDict
    optimizer = cls(learning_rate=0.1, rho=0.9)
    optimizer.build(made := variables(params()))
    optimizer.rho.assign(custom.OPTIONS[cls]["rho"])
    for g in gradients():
        optimizer.apply_gradients(pairs(g, made))
    assert_close([v.value for v in made], jax.tree.leaves(wanted(cls, "plain")[-1]))


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
    with pytest.raises(ValueError, match="is none of those that the optimizer was built with"):
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


# What is wrong is loud.


class Plain(Optimizer):
    """A custom optimizer with nothing but a rate."""

    def __init__(self, learning_rate=0.1, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)

    def update_step(self, gradient, variable):
        variable.assign_sub(jnp.asarray(self.learning_rate, variable.dtype) * gradient)


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


# Over eight devices.


def sharded(tree, mesh):
    def put(leaf):
        spec = P("data") if leaf.ndim == 2 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def is_split(x):
    return len({str(shard.index) for shard in x.addressable_shards}) == 8


def on_a_replica(g):
    """Return what one device has after two steps with a part of the gradients."""
    options = {**custom.OPTIONS[custom.GuardedAdam], "axis_name": "data", "clipnorm": 1.0}
    mine = jax.tree.map(lambda x: x[0], g)
    optimizer = custom.GuardedAdam(**options)
    imperative = through_variables(optimizer, params(), [mine, mine])
    assert optimizer.chain
    return jax.tree.map(
        lambda x: x[None], (imperative, through_update(optimizer, params(), [mine] * 2))
    )


def report_on_eight_devices():
    """Return for each class and way how far it is from one device, and what is split."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    parts = jax.tree.map(lambda x: jnp.stack([t / 36 * x for t in range(1, 9)]), gradients()[0])
    mapped = jax.shard_map(on_a_replica, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    summed = jax.jit(mapped)(parts)
    options = {**custom.OPTIONS[custom.GuardedAdam], "clipnorm": 1.0}
    alone = through_variables(custom.GuardedAdam(**options), params(), gradients()[:1] * 2)
    apart = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), summed, (alone, alone)
    )
    report: dict[str, Any] = {"shard_map": float(max(jax.tree.leaves(apart)))}
    ways = {"variables": through_variables, "apply": through_apply, "steps": in_steps}
    for cls, options in custom.OPTIONS.items():
        expected = plainest(cls, options)[-1]
        for name, way in ways.items():
            if name == "apply" and cls is not custom.MomentumSGD:
                continue  # the same program as for variables
            optimizer = cls(**options, mesh=mesh)
            p, grads = sharded(params(), mesh), [sharded(g, mesh) for g in gradients()]
            got = way(optimizer, p, grads)[-1]
            apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), got, expected)
            slots = [v for v in optimizer.variables if v.ndim == 2]
            report[f"{cls.__name__}-{name}"] = {
                "apart": max(jax.tree.leaves(apart)),
                "split": is_split(got["dense"]["kernel"]) and all(is_split(v.value) for v in slots),
                "on mesh": all(
                    getattr(v.sharding, "mesh", None) == mesh
                    for v in optimizer.variables
                    if optimizer.built
                ),
                "rate on mesh": name == "steps" or optimizer.learning_rate.sharding.mesh == mesh,
            }
        state = cls(**options).init(sharded(params(), mesh))
        big = [x for x in jax.tree.leaves(state) if x.ndim == 2]
        report[f"{cls.__name__}-init"] = {"split": all(is_split(x) for x in big)}
    return json.dumps(report)


@pytest.fixture(scope="module")
def report():
    return on_eight_devices(__name__, "report_on_eight_devices")


def test_replicas_sum_their_gradients(report):
    assert report["shard_map"] < 1e-6


@pytest.mark.parametrize("cls", CLASSES)
def test_eight_devices_equal_one(cls, report):
    for way in ("variables", "steps", *(["apply"] if cls is custom.MomentumSGD else [])):
        found = report[f"{cls.__name__}-{way}"]
        assert found.pop("apart") < 1e-6
        assert found == {"split": True, "on mesh": True, "rate on mesh": True}
    assert report[f"{cls.__name__}-init"] == {"split": True}
