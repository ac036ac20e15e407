"""What an optimizer keeps between calls can be read, set, saved and restored, or says why not."""

import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from tests.cases import on_eight_devices

T, optim = ol.transforms, ol.optimizers
VALUE, INVALID, SHAPE = ValueError, ol.InvalidType, ol.TreeMismatch

W, B = np.array([1.0, -2.0], np.float32), np.float32(0.5)
GW, GB = np.array([0.25, 1.0], np.float32), np.float32(-1.0)
ADORNED = {
    "weight_decay": 0.1,
    "clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 2,
}


def variables():
    return [ol.Variable(W, "w"), ol.Variable(B, "b")]


def pairs(made):
    return list(zip((GW, GB), made, strict=True))


def stepped(optimizer, times=1):
    """Return an optimizer after some steps, and its variables."""
    made = variables()
    for _ in range(times):
        optimizer.apply_gradients(pairs(made))
    return optimizer, made


def values(made):
    return [np.asarray(v.value) for v in made]


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(got, wanted, rtol=1e-6):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


def state_of(optimizer):
    """Return all that an optimizer keeps, as numpy arrays."""
    return [v.numpy() for v in optimizer.variables], optimizer.get_config()


def assert_same_state(got, wanted):
    assert_equal(got[0], wanted[0])
    assert got[1] == wanted[1]


# Variables.


def test_variables_is_a_list_that_can_be_called():
    optimizer = optim.Adam(0.1)
    assert optimizer.variables == optimizer.variables() == [optimizer.iterations]
    optimizer.build(variables())
    names = ["iteration", "adam/m/w", "adam/m/b", "adam/v/w", "adam/v/b"]
    assert [v.name for v in optimizer.variables] == names
    assert [v.name for v in optimizer.variables()] == names
    assert optimizer.variables[0] is optimizer.iterations
    assert optimizer.variables[1] is optimizer.variables[1]  # and stays so


def test_hyperparameters_are_not_among_the_variables():
    optimizer, _ = stepped(optim.AdamW(0.1, **{**ADORNED, "loss_scale_factor": 8.0}))
    names = {v.name for v in optimizer.variables}
    slots = [
        f"{s}/{n}" for s in ("adam/m", "adam/v", "accumulate/sum", "ema/average") for n in "wb"
    ]
    assert names == {"iteration", "accumulate/gathered", *slots}


def test_building_twice_does_nothing():
    optimizer, made = stepped(optim.Adam(0.1))
    before = values(optimizer.variables)
    optimizer.build([ol.Variable(1.0, "other")])
    optimizer.build(made)
    assert_equal(values(optimizer.variables), before)


def test_an_optimizer_of_no_variables():
    optimizer = optim.Adam(0.1)
    optimizer.build([])
    assert optimizer.variables == [optimizer.iterations]
    assert optimizer.apply_gradients([]) is optimizer.iterations
    assert int(optimizer.iterations) == 0


def test_no_pairs_change_nothing_and_build_nothing():
    optimizer = optim.Adam(0.1)
    assert optimizer.apply_gradients(zip([], [], strict=True)) is optimizer.iterations
    assert not optimizer.built
    stepped(optimizer)
    optimizer.apply_gradients([])
    assert int(optimizer.iterations) == 1


# The counter.


def test_iterations_can_be_set_before_the_first_step():
    """Adam at t = 3 corrects by 1 - βᵗ: the first step is not of the size of the rate."""
    optimizer = optim.Adam(0.1, beta_1=0.5, beta_2=0.75)
    optimizer.iterations = 2
    assert int(optimizer.iterations) == 2
    stepped(optimizer)
    made = variables()
    optimizer = optim.Adam(0.1, beta_1=0.5, beta_2=0.75)
    optimizer.iterations = ol.Variable(2)
    optimizer.apply_gradients(pairs(made))
    m, v = 0.5 * GW, 0.25 * GW**2
    step = 0.1 * m / (1 - 0.5**3) / np.sqrt(v / (1 - 0.75**3))
    assert_close([made[0].value], [W - step], rtol=1e-5)
    assert int(optimizer.iterations) == int(optimizer.variables[0]) == 3


def test_iterations_are_assigned_to_after_build():
    schedule = ol.schedules.PiecewiseConstantDecay([4], [0.5, 0.25])
    optimizer, made = stepped(optim.SGD(schedule))
    with pytest.raises(
        RuntimeError, match=r"`iterations` must be set before.*Received: iterations=Variable"
    ):
        optimizer.iterations = ol.Variable(9)
    optimizer.iterations.assign(9)
    optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [W - 0.75 * GW, B - 0.75 * GB])
    assert int(optimizer.iterations) == 10


@pytest.mark.parametrize(("wrong", "error"), [(-1, VALUE), (1.5, INVALID), ("a", INVALID)])
def test_iterations_are_integers_from_0_on(wrong, error):
    optimizer = optim.SGD()
    with pytest.raises(error, match="`iterations` must be an integer of at least 0"):
        optimizer.iterations = wrong
    assert int(optimizer.iterations) == 0


# The rate.


def test_a_rate_is_read_and_set_at_any_time():
    optimizer = optim.SGD(0.5)
    assert isinstance(optimizer.learning_rate, ol.Variable)
    optimizer.learning_rate = 0.25
    assert float(optimizer.learning_rate) == 0.25
    optimizer, made = stepped(optimizer)
    assert_close(values(made), [W - 0.25 * GW, B - 0.25 * GB])
    for rate in (0.5, np.float32(0.5), jnp.float32(0.5), ol.Variable(0.5)):
        before = values(made)
        optimizer.learning_rate = 1
        optimizer.learning_rate = rate
        optimizer.apply_gradients(pairs(made))
        assert_close(values(made), [before[0] - 0.5 * GW, before[1] - 0.5 * GB])
    kept: Any = optimizer.learning_rate
    kept.assign(0.125)
    assert optimizer.learning_rate is kept
    before = values(made)
    optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [before[0] - 0.125 * GW, before[1] - 0.125 * GB])
    assert optimizer.get_config()["learning_rate"] == 0.125
    assert repr(optimizer) == "SGD(learning_rate=0.125)"


def test_a_rate_that_was_set_reaches_functions_and_steps():
    optimizer = optim.SGD(0.5)
    for assign in (
        lambda: setattr(optimizer, "learning_rate", 0.25),
        lambda: optimizer.learning_rate.assign(0.25),
    ):
        optimizer.learning_rate = 0.5
        _ = optimizer.chain
        assign()
        assert float(optimizer.init({"w": W})["rate"]["learning_rate"]) == 0.25
        assert float(optimizer.chain.init({"w": W})["rate"]["learning_rate"]) == 0.25
        step = ol.optimize_loss(lambda p: jnp.sum(p["w"]), optimizer=optimizer)
        assert float(step.init({"w": W}).optimizer["rate"]["learning_rate"]) == 0.25


def test_a_state_does_not_share_the_memory_of_the_rate():
    optimizer = optim.Adam(0.1)
    state = optimizer.init({"w": W})
    update = jax.jit(optimizer.update, donate_argnums=1)
    update({"w": GW}, state, {"w": W})
    assert float(optimizer.learning_rate) == np.float32(0.1)


WRONG_RATES = {
    "negative": (-1.0, VALUE, "`learning_rate` must be at least 0. Received: learning_rate=-1.0."),
    "nan": (float("nan"), VALUE, "`learning_rate` must be at least 0 and finite."),
    "text": ("fast", INVALID, "`learning_rate` must be a number. Received: learning_rate='fast'."),
    "none": (None, INVALID, "`learning_rate` must be"),
    "array": (jnp.ones(2), INVALID, "`learning_rate` must be a scalar"),
}


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("name", WRONG_RATES)
def test_wrong_rates_are_refused(name, is_built):
    rate, error, message = WRONG_RATES[name]
    optimizer = optim.SGD(0.5)
    if is_built:
        stepped(optimizer)
    with pytest.raises(error) as caught:
        optimizer.learning_rate = rate
    assert message in str(caught.value)
    assert float(optimizer.learning_rate) == 0.5
    with pytest.raises(error):
        optim.SGD(rate)


def test_a_schedule_is_read_as_the_rate_of_the_last_step():
    rates = [0.2, 0.1, 0.05]
    schedule = ol.schedules.PiecewiseConstantDecay([0, 1], rates)
    optimizer, made = optim.SGD(schedule), variables()
    seen = [float(optimizer.learning_rate)]
    for _ in range(3):
        optimizer.apply_gradients(pairs(made))
        seen.append(float(optimizer.learning_rate))
    assert_close(seen, [rates[0], *rates])
    assert_close(values(made), [W - sum(rates) * GW, B - sum(rates) * GB])
    assert optimizer.get_config()["learning_rate"]["class_name"] == "PiecewiseConstantDecay"


def test_schedules_and_numbers_take_turns_where_they_can():
    halving = ol.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer = optim.SGD(halving)
    optimizer.learning_rate = 0.25  # not built: anything goes
    optimizer.learning_rate = halving
    optimizer.learning_rate = 0.25
    optimizer, made = stepped(optimizer)
    optimizer.learning_rate = halving  # its value after one step is 0.25
    optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [W - 0.5 * GW, B - 0.5 * GB])
    with pytest.raises(TypeError, match="`learning_rate` must stay a schedule"):
        optimizer.learning_rate = 0.5
    optimizer.learning_rate = lambda step: jnp.where(step == 2, 0.25, 0.0)
    optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [W - 0.75 * GW, B - 0.75 * GB])


def test_a_schedule_takes_the_counter():
    optimizer, _ = stepped(optim.SGD(0.1), times=2)
    for schedule in (
        ol.schedules.ExponentialDecay(0.5, 1, 0.5),
        ol.schedules.PiecewiseConstantDecay([1], [0.5, 0.125]),
        ol.schedules.PolynomialDecay(0.25, 4, 0.0),
    ):
        assert float(schedule(optimizer.iterations)) == 0.125


# Options after build: numbers take effect, and what is not a number is refused.


class Counted(T.ScaleByLearningRate):
    traces = 0

    def factor(self, k):
        Counted.traces += 1
        return super().factor(k)


class CountedAdam(optim.Adam):
    def links(self):
        return {**super().links(), "rate": Counted(self.rate)}


def traces_of(function):
    before = Counted.traces
    function()
    return Counted.traces - before


NUMBERS = {
    "beta_1": 0.25,
    "beta_2": 0.5,
    "epsilon": 0.5,
    "weight_decay": 0.5,
    "clipnorm": 0.25,
    "ema_momentum": 0.125,
    "ema_overwrite_frequency": 3,
    "gradient_accumulation_steps": 3,
    "loss_scale_factor": 2.0,
}


def test_numbers_take_effect_without_a_trace():
    options = {**ADORNED, "loss_scale_factor": 4.0}
    optimizer = CountedAdam(0.1, **options)
    assert traces_of(lambda: stepped(optimizer)) > 0
    made = variables()
    optimizer = CountedAdam(0.1, **options)
    optimizer.build(made)
    for option, value in NUMBERS.items():
        setattr(optimizer, option, value)
    other = CountedAdam(0.1, **{**options, **NUMBERS})
    assert optimizer.get_config() == other.get_config()
    assert traces_of(lambda: [optimizer.apply_gradients(pairs(made)) for _ in range(6)]) == 0
    _, others = stepped(other, times=6)
    assert_equal(values(made), values(others))
    optimizer.finalize_variable_values(made)
    other.finalize_variable_values(others)
    assert_equal(values(made), values(others))


def test_a_changed_number_retraces_no_step_and_no_scan(caplog):
    step = ol.optimize_loss(lambda p: jnp.sum(p["w"] ** 2), optimizer=optim.Adam(0.1))
    state = step.init({"w": W})
    with caplog.at_level(logging.INFO, logger="optimize_loss"):
        state, _ = step(state)
        state, _ = step(state.set(learning_rate=0.2, beta_1=0.5))
    assert len([r for r in caplog.records if r.message.startswith("tracing a step")]) == 1


def test_a_number_may_become_a_schedule():
    optimizer, made = stepped(optim.SGD(1.0, momentum=0.0))
    optimizer.momentum = lambda step: jnp.where(step < 2, 0.0, 1.0)
    for _ in range(2):
        optimizer.apply_gradients(pairs(made))
    assert_close(values(made), [W - 4 * GW, B - 4 * GB])  # 1 + 1 + (1 + 1)


STRUCTURE = {
    "amsgrad": True,
    "weight_decay": None,
    "clipnorm": None,
    "use_ema": False,
    "gradient_accumulation_steps": None,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": 4.0,
    "mesh": jax.make_mesh((1,), ("x",), (AxisType.Auto,)),
}
WRONG = {
    "beta_1": 1.5,
    "epsilon": 0.0,
    "weight_decay": -1.0,
    "clipnorm": "a",
    "clipvalue": 1.0,
    "use_ema": 1,
    "jit_compile": None,
    "ema_momentum": 2.0,
    "ema_overwrite_frequency": 0,
    "gradient_accumulation_steps": 1.5,
    "name": 3,
    "axis_name": 3,
    "mesh": "mesh",
}


@pytest.mark.parametrize(
    ("kind", "option"),
    [*(("structure", name) for name in STRUCTURE), *(("wrong", name) for name in WRONG)],
)
def test_other_options_are_refused_and_nothing_changes(kind, option):
    value = (STRUCTURE if kind == "structure" else WRONG)[option]
    optimizer, made = stepped(optim.Adam(0.1, **ADORNED), times=3)
    same, others = stepped(optim.Adam(0.1, **ADORNED), times=3)
    before = getattr(optimizer, option)
    with pytest.raises((ValueError, TypeError)) as caught:
        setattr(optimizer, option, value)
    if kind == "wrong" or option == "mesh":
        assert f"`{option}`" in str(caught.value)
    else:
        assert "Once an optimizer is built, only its numbers can be changed." in str(caught.value)
    assert getattr(optimizer, option) == before
    assert optimizer.chain == same.chain
    assert_same_state(state_of(optimizer), state_of(same))
    optimizer.apply_gradients(pairs(made))
    same.apply_gradients(pairs(others))
    assert_equal(values(made), values(others))


def test_before_build_every_option_can_be_changed():
    optimizer = optim.Adam(0.1)
    for option, value in {**ADORNED, "amsgrad": True, "jit_compile": False}.items():
        setattr(optimizer, option, value)
    _, made = stepped(optimizer, times=4)
    _, others = stepped(optim.Adam(0.1, amsgrad=True, jit_compile=False, **ADORNED), times=4)
    assert_equal(values(made), values(others))
    with pytest.raises(ValueError, match="At most one of `clipnorm`"):
        optim.Adam(clipnorm=1.0).clipvalue = 1.0


@pytest.mark.parametrize(
    "around",
    [
        lambda inner: optim.MultiOptimizer({"**": inner}),
        lambda inner: optim.LossScaleOptimizer(inner, initial_scale=1.0),
    ],
    ids=["multi", "loss-scale"],
)
def test_options_of_an_optimizer_inside_take_effect(around):
    inner = optim.Adam(0.1, weight_decay=0.1)
    outer = around(inner)
    _ = outer.chain
    inner.amsgrad = True
    made = variables()
    outer.build(made)
    inner.beta_1, inner.weight_decay = 0.25, 0.5
    inner.learning_rate = 0.5
    for _ in range(3):
        outer.apply_gradients(pairs(made))
    _, others = stepped(optim.Adam(0.5, beta_1=0.25, amsgrad=True, weight_decay=0.5), times=3)
    assert_equal(values(made), values(others))
    with pytest.raises(ValueError, match="only its numbers can be changed"):
        inner.amsgrad = False
    assert inner.amsgrad
    inner.learning_rate = ol.schedules.ExponentialDecay(0.5, 1, 0.5)
    before = values(made)
    outer.apply_gradients(pairs(made))
    assert not np.array_equal(made[0].value, before[0])
    with pytest.raises(ValueError, match="must be called on what is inside"):
        outer.exclude_from_weight_decay(made)


# Weights, files.


def test_set_weights():
    optimizer, made = stepped(optim.Adam(0.1))
    weights = [3, *(np.full(v.shape, i + 1.0) for i, v in enumerate(optimizer.variables[1:]))]
    optimizer.set_weights(weights)
    assert_equal(values(optimizer.variables), weights)
    other, others = optim.Adam(0.1), [ol.Variable(v, v.name) for v in made]
    other.build(others)
    other.set_weights(optimizer.variables)
    optimizer.apply_gradients(pairs(made))
    other.apply_gradients(pairs(others))
    assert_equal(values(made), values(others))
    other.set_weights(iter(optimizer.variables))


BAD_WEIGHTS = {
    "too-few": (
        [0],
        VALUE,
        "`weights` must be as many as the optimizer has variables, 5. Received: 1",
    ),
    "shape": ([0, np.ones(3)] + [np.ones(2)] * 3, SHAPE, "'adam/m/w' must keep its shape (2,)"),
    "dtype": ([0.5] + [np.ones(2)] * 4, INVALID, "'iteration' must keep its dtype int32"),
    "last": ([7, W, B, W, W], SHAPE, "'adam/v/b' must keep its shape ()"),
    "text": ([7, "a", B, W, B], INVALID, "`value` must be an array or a number"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_change_nothing(name):
    weights, error, message = BAD_WEIGHTS[name]
    optimizer, _ = stepped(optim.Adam(0.1))
    before = values(optimizer.variables)
    with pytest.raises(error) as caught:
        optimizer.set_weights(weights)
    assert message in str(caught.value)
    assert_equal(values(optimizer.variables), before)


class Group:
    """The part of `h5py.Group` that is needed: paths make groups, arrays are copied."""

    def __init__(self):
        self.inside: dict[str, Any] = {}

    def keys(self):
        return self.inside.keys()

    def __iter__(self):
        return iter(self.inside)

    def __getitem__(self, path):
        first, _, rest = path.partition("/")
        return self.inside[first][rest] if rest else self.inside[first]

    def __setitem__(self, path, value):
        first, _, rest = path.partition("/")
        if rest:
            self.inside.setdefault(first, Group())[rest] = value
        else:
            self.inside[first] = Dataset(np.array(value))


class Dataset:
    """What a group gives in place of arrays."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)


@pytest.mark.parametrize("make_store", [dict, Group])
def test_saved_and_loaded(make_store):
    options: dict[str, Any] = {"amsgrad": True, **ADORNED}
    optimizer, made = stepped(optim.Adam(0.1, **options), times=3)
    store = make_store()
    optimizer.save_own_variables(store)
    other, others = optim.Adam(0.1, **options), [ol.Variable(v, v.name) for v in made]
    other.build(others)
    other.load_own_variables(store)
    assert_same_state(state_of(other), state_of(optimizer))
    for _ in range(2):
        optimizer.apply_gradients(pairs(made))
        other.apply_gradients(pairs(others))
    assert_equal(values(made), values(others))
    assert_same_state(state_of(other), state_of(optimizer))


def test_what_is_saved_is_a_copy():
    optimizer, made = stepped(optim.Adam(0.1))
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    before = {name: x.copy() for name, x in store.items()}
    optimizer.apply_gradients(pairs(made))
    assert list(store) == [v.name for v in optimizer.variables]
    assert_equal(store.values(), before.values())


def edited(**changes):
    optimizer, _ = stepped(optim.Adam(0.1))
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    for name, value in changes.items():
        name = name.replace("__", "/")
        if value is None:
            del store[name]
        else:
            store[name] = value
    return store


MISMATCH = {
    "missing": (lambda: edited(adam__m__w=None), "Missing: ['adam/m/w']. Extra: []."),
    "extra": (lambda: edited(adam__x=W), "Missing: []. Extra: ['adam/x']."),
    "shape": (
        lambda: edited(adam__v__b=W),
        "The variable 'adam/v/b' must have the shape and dtype",
    ),
    "dtype": (lambda: edited(adam__v__b=np.float64(1)), "Received: ((), dtype('float64'))."),
    "counter": (lambda: edited(iteration=np.float32(1)), "'iteration' must have the shape and dt"),
    "number": (lambda: edited(adam__v__b=1.0), "'adam/v/b' must have the shape and dtype"),
    "text": (lambda: edited(adam__v__b="a"), "'adam/v/b' must have the shape and dtype"),
    "empty": (dict, "Missing: ['adam/m/b', 'adam/m/w', 'adam/v/b', 'adam/v/w', 'iteration']."),
}


@pytest.mark.parametrize("name", MISMATCH)
def test_what_is_not_this_optimizers_is_not_loaded(name):
    make, message = MISMATCH[name]
    optimizer, _ = stepped(optim.Adam(0.1), times=2)
    before = values(optimizer.variables)
    with pytest.raises(ol.CheckpointMismatch) as caught:
        optimizer.load_own_variables(make())
    assert message in str(caught.value)
    assert_equal(values(optimizer.variables), before)


def test_a_store_is_a_mapping():
    optimizer, _ = stepped(optim.Adam(0.1))
    with pytest.raises(ol.InvalidType, match="`store` must be a mapping of arrays"):
        optimizer.load_own_variables([1.0])


UNBUILT = {
    "set_weights": lambda o: o.set_weights([]),
    "save_own_variables": lambda o: o.save_own_variables({}),
    "load_own_variables": lambda o: o.load_own_variables({}),
    "finalize_variable_values": lambda o: o.finalize_variable_values(variables()),
}


@pytest.mark.parametrize("name", UNBUILT)
def test_what_needs_variables_says_so(name):
    with pytest.raises(ValueError, match=f"`{name}` needs the optimizer's variables: call `build"):
        UNBUILT[name](optim.Adam(0.1))


# Adding variables.


class Bare(optim.SGD):
    """An optimizer to add variables to."""


ADDED = {
    "scalar": (lambda o, v: o.add_variable(), ("variable", (), "float32", 0.0)),
    "list": (lambda o, v: o.add_variable([2], name="x"), ("x", (2,), "float32", 0.0)),
    "array": (lambda o, v: o.add_variable(np.array([2, 1])), ("variable", (2, 1), "float32", 0.0)),
    "ones": (lambda o, v: o.add_variable((), "int32", "ones"), ("variable", (), "int32", 1)),
    "case": (lambda o, v: o.add_variable(initializer="Ones"), ("variable", (), "float32", 1.0)),
    "function": (
        lambda o, v: o.add_variable((2,), initializer=lambda s, d: jnp.full(s, 3, d)),
        ("variable", (2,), "float32", 3.0),
    ),
    "like": (lambda o, v: o.add_variable_from_reference(v, "m"), ("m/w", (2,), "float32", 0.0)),
    "shape": (lambda o, v: o.add_variable_from_reference(v, "m", ()), ("m/w", (), "float32", 0.0)),
    "initial": (
        lambda o, v: o.add_variable_from_reference(v, "m", initial_value=[3, 3]),
        ("m/w", (2,), "float32", 3.0),
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_added_variables(name):
    add, (expected, shape, dtype, value) = ADDED[name]
    v = add(Bare(), ol.Variable(W, "w"))
    assert (v.name, v.shape, str(v.dtype)) == (expected, shape, dtype)
    np.testing.assert_array_equal(v.value, np.full(shape, value))


BAD_VARIABLES = {
    "initializer": (lambda o, v: o.add_variable(initializer="glorot"), VALUE, "`initializer` must"),
    "initial-shape": (
        lambda o, v: o.add_variable((2,), initializer=lambda s, d: jnp.ones(3)),
        SHAPE,
        "`initializer` must return an array of the shape (2,). Received: (3,).",
    ),
    "shape": (
        lambda o, v: o.add_variable(3),
        INVALID,
        "`shape` must be integers. Received: shape=3",
    ),
    "lengths": (lambda o, v: o.add_variable((1.5,)), INVALID, "`shape` must be integers."),
    "negative": (lambda o, v: o.add_variable((-1,)), VALUE, "`shape` must be at least 0"),
    "dtype": (lambda o, v: o.add_variable((), "real"), INVALID, "`dtype` must be a dtype."),
    "name": (lambda o, v: o.add_variable(name=3), INVALID, "`name` must be text."),
    "reference": (
        lambda o, v: o.add_variable_from_reference(W, "m"),
        INVALID,
        "`model_variable` must be a `Variable`",
    ),
    "prefix": (
        lambda o, v: o.add_variable_from_reference(v, 3),
        INVALID,
        "`variable_name` must be text. Received: variable_name=3.",
    ),
    "value": (
        lambda o, v: o.add_variable_from_reference(v, "m", initial_value="a"),
        INVALID,
        "`initial_value` must be an array or a number.",
    ),
    "value-shape": (
        lambda o, v: o.add_variable_from_reference(v, "m", shape=(3,), initial_value=1.0),
        SHAPE,
        "`initial_value` must have the shape (3,). Received: ().",
    ),
    "twice": (
        lambda o, v: [o.add_variable_from_reference(v, "m") for _ in range(2)],
        VALUE,
        "`name` must differ from those of the optimizer's other variables, ['m/w'].",
    ),
}


@pytest.mark.parametrize("name", BAD_VARIABLES)
def test_bad_variables(name):
    add, error, message = BAD_VARIABLES[name]
    with pytest.raises(error) as caught:
        add(Bare(), ol.Variable(W, "w"))
    assert message in str(caught.value)


def test_variables_added_to_an_optimizer_made_of_links_are_saved():
    class WithCount(optim.SGD):
        def build(self, var_list):
            super().build(var_list)
            self.seen = self.add_variable(name="seen")

        def apply_gradients(self, grads_and_vars, *args, **kwargs):
            result = super().apply_gradients(grads_and_vars, *args, **kwargs)
            self.seen.assign_add(1.0)
            return result

    optimizer, _ = stepped(WithCount(0.1), times=2)
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    assert store["seen"] == 2.0
    assert optimizer.variables[-1] is optimizer.seen


# What to update.


def test_unknown_variables_are_loud():
    optimizer, made = stepped(optim.Adam(0.1))
    with pytest.raises(ValueError, match=r"The variable 'ww' is none of those .* Nearest: \['w'"):
        optimizer.apply_gradients([(GW, ol.Variable(W, "ww"))])
    with pytest.raises(ValueError, match="'w' is none of those"):  # a name is not a variable
        optimizer.apply_gradients([(GW, ol.Variable(W, "w"))])
    with pytest.raises(ValueError, match="'x' is none of those"):
        optimizer.finalize_variable_values([made[0], ol.Variable(1.0, "x")])
    assert int(optimizer.iterations) == 1


MALFORMED = {
    "numbers": ([1, 2], INVALID, "`grads_and_vars` must be pairs of a gradient and a variable"),
    "triples": ([(1, 2, 3)], INVALID, "`grads_and_vars` must be pairs"),
    "no-list": (5, INVALID, "Received: grads_and_vars=5."),
    "mixed": (
        [(GW, ol.Variable(W)), (GB, B)],
        INVALID,
        "`var_list` must be a list of `optimize_lo",
    ),
    "twice": (
        [(GW, v := ol.Variable(W)), (GW, v)],
        VALUE,
        "`var_list` must have each variable once",
    ),
    "none": ([(None, ol.Variable(W, "w"))], VALUE, "No gradients: the gradient of every parameter"),
    "shape": ([(GB, ol.Variable(W, "w"))], SHAPE, "'w' must have the parameter's shape (2,)"),
    "text": (
        [("a", ol.Variable(B, "b"))],
        INVALID,
        "The gradient of 'b' must be an array of numbe",
    ),
    "complex": ([(GW * 1j, ol.Variable(W, "w"))], INVALID, "The update of 'w' must be real"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pairs_change_nothing_and_build_nothing(name):
    given, error, message = MALFORMED[name]
    optimizer = optim.Adam(0.1)
    with pytest.raises(error) as caught:
        optimizer.apply_gradients(given)
    assert message in str(caught.value)
    assert not optimizer.built
    assert optimizer.variables == [optimizer.iterations]
    stepped(optimizer)


def test_gradients_come_in_many_forms():
    wanted = values(stepped(optim.SGD(0.5))[1])
    for form in (jnp.asarray, np.float64, ol.Variable, lambda g: np.asarray(g, np.float16)):
        made = variables()
        optim.SGD(0.5).apply_gradients([(form(g), v) for g, v in pairs(made)])
        assert_equal(values(made), wanted)
    made = [ol.Variable(1.0)]
    optim.SGD(0.5).apply_gradients([(1, made[0])])
    assert float(made[0]) == 0.5


def test_arrays_in_pairs_come_back_as_new_values():
    optimizer, (w, b) = optim.SGD(0.1, momentum=0.9), (W, B)
    _, made = stepped(optim.SGD(0.1, momentum=0.9), times=3)
    for _ in range(3):
        w, b = optimizer.apply_gradients([(GW, w), (GB, b)])
    assert_equal([w, b], values(made))
    assert_equal([W], [np.array([1.0, -2.0], np.float32)])


def test_apply_takes_variables_too():
    _, expected = stepped(optim.Adam(0.1), times=4)
    optimizer, (w, b) = optim.Adam(0.1), variables()
    assert optimizer.apply([GW, GB], [w, b]) is optimizer.iterations
    optimizer.apply((GW, GB), [w, b])
    optimizer.apply([GW, GB])
    optimizer.apply({"x": {"w": GW}, "b": GB}, {"x": {"w": w}, "b": b})
    assert_equal(values([w, b]), values(expected))
    for grads in ([GW], [GW, GB, GB], {"w": GW}):
        with pytest.raises(ol.TreeMismatch, match="`grads` must have the structure of `params`"):
            optimizer.apply(grads, [w, b])


TREE, GRADS = {"w": W, "b": B}, {"w": GW, "b": GB}


def test_apply_goes_on_with_the_same_names():
    optimizer, p = optim.Adam(0.1), TREE
    p = optimizer.apply(GRADS, p)
    with pytest.raises(ValueError, match=r"other parameters: it has no .'x'.. Nearest"):
        optimizer.apply({"x": GW}, {"x": W})
    with pytest.raises(ValueError, match=r"for more parameters. Missing: \['b'\]"):
        optimizer.apply({"w": GW}, {"w": W})
    with pytest.raises(ol.TreeMismatch, match=r"parameter of shape \(3,\)"):
        optimizer.apply({"w": np.ones(3), "b": GB}, {"w": np.ones(3), "b": B})
    with pytest.raises(ol.TreeMismatch, match=r"`grads` must have .* Missing: \['b'\]"):
        optimizer.apply({"w": GW}, p)
    with pytest.raises(ValueError, match="used with trees; use another one for variables"):
        optimizer.apply_gradients([(GW, ol.Variable(W, "w"))])
    assert int(optimizer.iterations) == 1
    p = optimizer.apply(GRADS, p)
    _, expected = stepped(optim.Adam(0.1), times=2)
    assert_equal([p["w"], p["b"]], values(expected))


def test_apply_needs_parameters():
    for optimizer in (optim.SGD(), optim.SGD()):
        with pytest.raises(ValueError, match="`params` must be given unless"):
            optimizer.apply([GW])
        optimizer.apply([GW], [W])


def test_apply_leaves_integers_and_what_has_no_gradient_alone():
    optimizer = optim.SGD(0.5, momentum=0.5)
    tree = {"w": W, "n": 3, "b": B}
    with pytest.warns(UserWarning, match="There is no gradient for .'b'."):
        new = optimizer.apply({"w": GW, "n": None, "b": None}, tree)
    assert_equal([new["w"], new["n"], new["b"]], [W - GW / 2, 3, B])
    new = optimizer.apply({"w": GW, "n": np.int32(1), "b": GB}, new)
    assert_equal([new["w"], new["n"], new["b"]], [W - GW / 2 - GW * 0.75, 3, B - GB / 2])
    assert [v.name for v in optimizer.variables[1:]] == ["momentum/sum/w", "momentum/sum/b"] or [
        v.name for v in optimizer.variables[1:]
    ] == ["momentum/sum/b", "momentum/sum/w"]


def test_a_tree_may_have_any_containers():
    optimizer = optim.SGD(0.5)
    tree = ({"layers": [W, B]}, B)
    new = optimizer.apply(({"layers": [GW, GB]}, GB), tree)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert_equal(jax.tree.leaves(new), [W - GW / 2, B - GB / 2, B - GB / 2])


# Averages.


def test_averages_are_put_in_place():
    optimizer, made = stepped(optim.SGD(1.0, use_ema=True, ema_momentum=0.5), times=2)
    averages = [0.25 * p + 0.25 * (p - g) + 0.5 * (p - 2 * g) for p, g in ((W, GW), (B, GB))]
    tree = optimizer.finalize_variable_values({"w": made[0].value, "b": made[1].value})
    assert_close([tree["w"], tree["b"]], averages)
    assert_close(values(made), [W - 2 * GW, B - 2 * GB])  # a tree is not assigned to
    assert optimizer.finalize_variable_values([made[1]]) is None
    assert_close(values(made), [W - 2 * GW, averages[1]])
    optimizer.finalize_variable_values(made)
    assert_close(values(made), averages)


def test_without_averages_values_stay():
    optimizer, made = stepped(optim.Adam(0.1))
    before = values(made)
    optimizer.finalize_variable_values(made)
    assert_equal(values(made), before)
    tree = optim.SGD(0.1)
    new = tree.apply({"w": GW, "n": 0}, {"w": W, "n": 3})
    same = tree.finalize_variable_values(new)
    assert_equal([same["w"], same["n"]], [new["w"], new["n"]])
    with pytest.raises(ValueError, match="other parameters"):
        tree.finalize_variable_values({"x": W})


# Compiled or not, wherever the arrays are.


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adafactor", "Ftrl", "Muon", "ScheduleFreeAdamW"])
def test_compiled_equals_not_compiled(name):
    matrix, g = np.outer(W, W), np.outer(GW, W)
    seen = []
    for jit_compile in (False, True):
        optimizer = optim.get(name)
        optimizer.jit_compile = jit_compile
        made = [ol.Variable(matrix, "matrix"), *variables()]
        for _ in range(3):
            optimizer.apply_gradients([(g, made[0]), *pairs(made[1:])])
        seen.append(values(made))
    assert_close(*seen)


def built_inside(w):
    """Return what two steps give, of an optimizer that is made where it is used."""
    optimizer, v = optim.Adam(0.1, clipnorm=0.5, use_ema=True), ol.Variable(w, "w")
    for _ in range(2):
        optimizer.minimize(lambda: v.value @ v.value, [v])
    assert optimizer.chain.links  # the rate is still a number, and not traced
    tree = optim.Adam(0.1, clipnorm=0.5)
    p = {"w": w}
    for _ in range(2):
        p = tree.apply({"w": 2 * p["w"]}, p)
    return v.value, p["w"], optimizer.iterations.value


def test_an_optimizer_that_is_made_inside_works():
    expected = [np.asarray(x) for x in built_inside(W)]
    assert_close([expected[1]], [expected[0]])
    assert_close(jax.jit(built_inside)(W), expected)
    batched = jax.vmap(built_inside)(jnp.stack([W, W]))
    assert_close([x[1] for x in batched], expected)
    jax.grad(lambda w: built_inside(w)[0].sum())(W)


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("way", ["jit", "constants", "vmap", "grad"])
def test_an_optimizer_from_outside_is_loud_and_stays_as_it_is(way, is_built):
    optimizer, made = stepped(optim.Adam(0.1)) if is_built else (optim.Adam(0.1), variables())
    tree = optim.Adam(0.1)
    if is_built:
        tree.apply(GRADS, TREE)
    before = values(made)

    def use(g):
        optimizer.apply_gradients([(g, v) for v in made])
        return g

    def use_tree(g):
        return tree.apply({"w": GW * g, "b": GB * g}, TREE)["b"]

    ways = {
        "jit": lambda f: jax.jit(f)(1.0),
        "constants": lambda f: jax.jit(lambda: f(1.0))(),
        "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
        "grad": lambda f: jax.grad(f)(1.0),
    }
    for function in (use, use_tree):
        with pytest.raises(ol.InvalidType, match=r"made outside of a JAX transformation|shape"):
            ways[way](function)
    assert optimizer.built == tree.built == is_built
    assert int(optimizer.iterations) == int(tree.iterations) == int(is_built)
    assert_equal(values(made), before)
    optimizer.apply_gradients(pairs(made))
    tree.apply(GRADS, TREE)


def test_functions_work_wherever_the_optimizer_was_made():
    optimizer = optim.Adam(0.1)

    @jax.jit
    def two(w):
        p, state = {"w": w}, optimizer.init({"w": w})
        for _ in range(2):
            updates, state = optimizer.update({"w": 2 * p["w"]}, state, p)
            p = {"w": p["w"] + updates["w"]}
        return p["w"]

    v = ol.Variable(W, "w")
    for _ in range(2):
        optimizer.minimize(lambda: v.value @ v.value, [v])
    assert_close([two(W)], [v.value])


def test_float64():
    with jax.enable_x64(True):
        optimizer, v = optim.Adam(0.1, weight_decay=0.1), ol.Variable(W.astype(np.float64), "w")
        narrow = ol.Variable(B, "b")
        assert optimizer.learning_rate.dtype == np.float64
        for _ in range(3):
            optimizer.apply_gradients([(GW, v), (GB, narrow)])
        optimizer.learning_rate = 0.05
        optimizer.apply_gradients([(GW, v), (GB, narrow)])
        assert (v.dtype, narrow.dtype, optimizer.iterations.dtype) == (
            "float64",
            "float32",
            "int32",
        )
        assert {x.name: str(x.dtype) for x in optimizer.variables} == {
            "iteration": "int32",
            "adam/m/w": "float64",
            "adam/m/b": "float32",
            "adam/v/w": "float64",
            "adam/v/b": "float32",
        }
        p, m, u = W.astype(np.float64), 0.0, 0.0
        for t, rate in enumerate([0.1, 0.1, 0.1, 0.05], start=1):
            m, u = 0.9 * m + 0.1 * GW.astype(float), 0.999 * u + 0.001 * GW.astype(float) ** 2
            alpha = rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            p = p - rate * 0.1 * p - alpha * m / (np.sqrt(u) + 1e-7)
        np.testing.assert_allclose(v.value, p, rtol=1e-12)
        store: dict[str, Any] = {}
        optimizer.save_own_variables(store)
        optimizer.load_own_variables(store)


def on_a_mesh():
    """Return where the arrays of optimizers with `mesh` are, and how far they are from none."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    big, g = np.linspace(-1, 1, 16, dtype=np.float32), np.linspace(1, 2, 16, dtype=np.float32)
    report = {}
    for name in ("Adam", "Adafactor", "SGD"):
        seen = []
        for placed in (True, False):
            optimizer = optim.get({"class_name": name, "config": {"use_ema": True}})
            optimizer.mesh = mesh if placed else None
            v = ol.Variable(jax.device_put(big, split) if placed else big, "big")
            w = ol.Variable(jax.device_put(W, NamedSharding(mesh, P())) if placed else W, "w")
            traces = []
            for _ in range(3):
                optimizer.apply_gradients([(g, v), (GW, w)])
                traces.append(_compiled_programs())
            seen.append(np.asarray(v.value))
            if placed:
                slots = [x for x in optimizer.variables if x.name.endswith("/big") and x.size == 16]
                shardings = [x.sharding for x in optimizer.variables]
                fresh = optim.get({"class_name": name, "config": {"use_ema": True}})
                fresh.mesh = mesh
                fresh.build([ol.Variable(v, "big"), ol.Variable(w, "w")])
                store: dict[str, Any] = {}
                optimizer.save_own_variables(store)
                fresh.load_own_variables(store)
                report[name] = {
                    "split": len(slots) > 0 and all(x.sharding == split for x in slots),
                    "on the mesh": all(x.mesh == mesh for x in shardings),
                    "rate too": optimizer.learning_rate.sharding.mesh == mesh,
                    "programs": traces[-1] - traces[0],
                    "restored where it was": [x.sharding for x in fresh.variables] == shardings,
                }
        report[name]["apart"] = float(np.max(np.abs(seen[0] - seen[1])))
    state = optim.Adam(0.1, mesh=mesh).init({"w": W})
    report["init"] = all(x.sharding.mesh == mesh for x in jax.tree.leaves(state))
    return json.dumps(report)


def _compiled_programs():
    from optimize_loss.optimizers import _boxes

    compiled: Any = _boxes._apply_compiled
    return compiled._cache_size()


def test_on_a_mesh():
    report = on_eight_devices(__name__, "on_a_mesh")
    assert report.pop("init")
    for found in report.values():
        assert found.pop("apart") < 1e-6
        assert found == {
            "split": True,
            "on the mesh": True,
            "rate too": True,
            "programs": 0,
            "restored where it was": True,
        }
