"""Every recorded run of Keras 2.15 and Keras 3 replays, in each way to use an optimizer.

What ours does otherwise, each with a test of its own at the end:

- `keras2-global_beats_clipvalue`: of two clips Keras 2 lets one win and is silent. We raise.
- `keras2-LossScaleOptimizer_SGD`: the numbers replay; a skipped step is not counted, as in Keras 3.
- `keras3-Lion_defaults`: the default rate is 1e-4, as in Keras 2.15 and in the paper, not 1e-3.
- `keras3-SGD_accum2_wd_clip_schedule`: Keras 3 evaluates a schedule at the number of calls, ours at
  the number of updates, like bias correction and average. At the same numbers it replays.
- `keras3-none_grad_masked_ema`: Keras 3 also averages parameters that have no gradient, and starts
  at the first new values. Ours is the average of Keras 2.15: it starts at the initial values and
  leaves those without a gradient alone. (The record has none for the bias where t % 3 == 2.)

In place of what JAX does not have stand dense gradients with rows of zeros, for IndexedSlices, and
names without `:0`, which is ignored in patterns. A state of ours may have more arrays: the sums of
a momentum that is 0, and counters.
"""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from tests.golden import golden_data as golden

RECORDS = {name: golden.load(f"{name}.json") for name in ("keras2", "keras3")}
CASES = {f"{name}-{c['case']}": c for name, record in RECORDS.items() for c in record["cases"]}
SPARSE = {c["case"]: c for c in RECORDS["keras2"]["sparse_cases"]}
CONFIGS = {
    f"{name}-{cls}": (cls, config)
    for name, record in RECORDS.items()
    for cls, config in record["configs"].items()
}
OTHERWISE = {
    "keras2-global_beats_clipvalue",
    "keras2-LossScaleOptimizer_SGD",
    "keras3-Lion_defaults",
    "keras3-SGD_accum2_wd_clip_schedule",
    "keras3-none_grad_masked_ema",
}
SAME = sorted(CASES.keys() - OTHERWISE)
PURE = [n for n in SAME if not any(option.startswith("_") for option in CASES[n]["kwargs"])]
AVERAGED = [n for n in SAME if "params_after_finalize" in CASES[n]]

# Arrays that Keras keeps and Adafactor has no use for: of the rows and columns of a vector, and of
# the squares of a matrix.
DUMMIES = collections.Counter({(): 4, (4, 3): 1})

loss_and_grads = jax.jit(jax.value_and_grad(golden.loss))


def close(name):
    return {**golden.CLOSE, **({"atol": 1e-5} if "Muon" in name else {})}


def options(case):
    return {n: x for n, x in case["kwargs"].items() if not n.startswith("_")}


def optimizer_of(case, **changed):
    kwargs = {**options(case), **changed}
    if isinstance(kwargs.get("learning_rate"), dict):
        kwargs["learning_rate"] = ol.optimizers.deserialize(kwargs["learning_rate"])
    return getattr(ol.optimizers, case["optimizer"])(**kwargs)


def variables(**constraints):
    given = golden.PROBLEM["initial_params"]
    made = {n: ol.Variable(np.float32(given[n]), n) for n in golden.SHAPES}
    for name, constraint in constraints.items():
        made[name].constraint = constraint
    return made


def tree(named):
    """Return the parameters or gradients as the loss takes them."""
    value = {name: getattr(x, "value", x) for name, x in named.items()}
    return {
        "dense": {"kernel": value["dense/kernel"], "bias": value["dense/bias"]},
        "scale": value["scale"],
    }


def named(grads):
    return {"dense/kernel": grads["dense"]["kernel"], "dense/bias": grads["dense"]["bias"]} | {
        "scale": grads["scale"]
    }


class Replay:
    """A run through variables, with the actions that the names of a case describe.

    Attributes:
      rows: the parameters before the first step and after every step.
      losses, rates, iterations: of every step.
    """

    def __init__(self, optimizer, actions=(), without_bias=lambda t: False):
        actions = dict(actions)
        constrained = {"dense/kernel": jax.nn.relu} if "_constraint" in actions else {}
        self.optimizer, self.variables = optimizer, variables(**constrained)
        rates = {
            int(key.removeprefix("after_step_")): rate
            for key, rate in actions.get("_set_lr", {}).items()
        }
        self.exclude(actions)
        if "_iterations_start" in actions:
            optimizer.iterations = actions["_iterations_start"]
        self.rows, self.losses, self.rates, self.iterations = [self.row()], [], [], []
        for t, (x, y) in enumerate(zip(*golden.batches(), strict=True)):
            self.step(x, y, without_bias(t))
            if t in rates:
                optimizer.learning_rate = rates[t]

    def exclude(self, actions):
        if texts := actions.get("_exclude_var_names"):
            self.optimizer.exclude_from_weight_decay(var_names=texts)
        if names := actions.get("_exclude_var_list"):
            listed = [self.variables[name] for name in names]
            self.optimizer.exclude_from_weight_decay(var_list=listed)

    def step(self, x, y, without_bias):
        loss, grads = loss_and_grads(tree(self.variables), x, y)
        grads = named(grads)
        if without_bias:
            grads["dense/bias"] = None
            with pytest.warns(UserWarning, match="no gradient for .*dense/bias"):
                self.apply(grads)
        else:
            self.apply(grads)
        self.rows.append(self.row())
        self.losses.append(loss)
        self.rates.append(float(self.optimizer.learning_rate))
        self.iterations.append(int(self.optimizer.iterations))

    def apply(self, grads):
        pairs = [(grads[name], v) for name, v in self.variables.items()]
        self.optimizer.apply_gradients(pairs)

    def row(self):
        return golden.flat(tree(self.variables))


def replay(case, **changed):
    actions = {n: x for n, x in case["kwargs"].items() if n.startswith("_")}
    known = {"_constraint", "_set_lr", "_iterations_start", "_none_grad"}
    assert actions.keys() <= known | {"_exclude_var_names", "_exclude_var_list"}
    masked = actions.get("_none_grad")
    assert masked in (None, "dense/bias at t%3==1")
    return Replay(
        optimizer_of(case, **changed), actions, lambda t: masked is not None and t % 3 == 1
    )


def recorded_shapes(case):
    names = ((name.split("/", 1)[-1], tuple(shape)) for name, shape, _ in case["final_state"])
    return collections.Counter(s for n, s in names if not n.startswith(("iteration", "learning_")))


@pytest.mark.parametrize("name", SAME)
def test_replays_through_variables(name):
    case = CASES[name]
    seen = replay(case)
    np.testing.assert_allclose(seen.rows, np.float32(case["params"]), **close(name))
    np.testing.assert_allclose(seen.losses, case["losses"], **close(name))
    if "iterations_raw" in case:
        k = seen.optimizer.gradient_accumulation_steps or 1
        assert seen.iterations == [calls // k for calls in case["iterations_raw"]]
    else:
        assert seen.iterations[-1] == case["iterations"]
    every = isinstance(case["lr"], list)
    rates = seen.rates if every else seen.rates[-1]
    np.testing.assert_allclose(rates, case["lr"], rtol=1e-6)
    shapes = collections.Counter(v.shape for v in seen.optimizer.variables[1:])
    missing = recorded_shapes(case) - shapes
    assert missing <= (DUMMIES if case["optimizer"] == "Adafactor" else collections.Counter())


@pytest.mark.parametrize("name", AVERAGED)
def test_averages_replay(name):
    case = CASES[name]
    seen = replay(case)
    last = tree(seen.variables)
    wanted = np.float32(case["params_after_finalize"])
    returned = seen.optimizer.finalize_variable_values(last)
    np.testing.assert_allclose(golden.flat(returned), wanted, **golden.CLOSE)
    np.testing.assert_array_equal(golden.flat(tree(seen.variables)), golden.flat(last))
    seen.optimizer.finalize_variable_values(list(seen.variables.values()))
    np.testing.assert_array_equal(seen.row(), golden.flat(returned))


@pytest.mark.parametrize("name", PURE[::4])
def test_the_three_ways_to_use_an_optimizer_agree(name):
    case = CASES[name]
    wanted = np.float32(case["params"])
    imperative = replay(case).rows

    optimizer, params = optimizer_of(case), golden.initial_params()
    step = ol.optimize_loss(golden.loss, optimizer=optimizer)
    state = step.init(params)
    trees, states = [golden.flat(params)], [golden.flat(state.params)]
    for x, y in zip(*golden.batches(), strict=True):
        params = optimizer.apply(loss_and_grads(params, x, y)[1], params)
        state, _ = step(state, x, y)
        trees.append(golden.flat(params))
        states.append(golden.flat(state.params))

    np.testing.assert_array_equal(trees, imperative)
    np.testing.assert_allclose(states, wanted, **close(name))
    np.testing.assert_allclose(states, trees, **close(name))


@pytest.mark.parametrize("cls", sorted({CASES[name]["optimizer"] for name in SAME}))
def test_no_array_is_in_a_state_twice(cls):
    # A step takes the memory of its state, and cannot take the same memory twice.
    params = golden.initial_params()
    state = getattr(ol.optimizers, cls)(use_ema=True).init(params)
    ids = [id(x) for x in jax.tree.leaves((params, state))]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_sparse_records_replay_through_dense_gradients(name):
    case, problem = SPARSE[name], RECORDS["keras2"]["problem"]["sparse"]

    def loss(params, index, target):
        return jnp.sum((params["emb"][index] - target) ** 2) / 2

    step = ol.optimize_loss(loss, optimizer=optimizer_of(case))
    state = step.init({"emb": jnp.float32(problem["table"])})
    rows, losses = [np.asarray(state.params["emb"])], []
    batches = np.array(problem["idx"], np.int32), np.array(problem["tgt"], np.float32)
    for index, target in zip(*batches, strict=True):
        state, metrics = step(state, index, target)
        rows.append(np.asarray(state.params["emb"]))
        losses.append(metrics["loss"])
    np.testing.assert_allclose(rows, np.float32(case["table"]), **golden.CLOSE)
    np.testing.assert_allclose(losses, case["losses"], **golden.CLOSE)


# What ours does otherwise.


def test_two_clips_raise():
    case = CASES["keras2-global_beats_clipvalue"]
    with pytest.raises(ValueError, match="`clipnorm`, `global_clipnorm`, `clipvalue`"):
        optimizer_of(case)
    one = Replay(optimizer_of(case, clipvalue=None))  # Keras' winner
    np.testing.assert_allclose(one.rows, np.float32(case["params"]), **golden.CLOSE)


def test_lion_has_the_default_rate_of_keras_2():
    assert ol.optimizers.Lion().get_config()["learning_rate"] == 1e-4
    case = CASES["keras3-Lion_defaults"]
    seen = replay(case, learning_rate=1e-3)
    np.testing.assert_allclose(seen.rows, np.float32(case["params"]), **golden.CLOSE)


def test_schedules_count_updates():
    case = CASES["keras3-SGD_accum2_wd_clip_schedule"]
    assert case["kwargs"]["learning_rate"] == "ExponentialDecay(0.1, 5, 0.5)"
    decay = ol.schedules.ExponentialDecay(0.1, 5, 0.5)
    seen = replay(case, learning_rate=lambda update: decay(2 * update + 1))
    np.testing.assert_allclose(seen.rows, np.float32(case["params"]), **golden.CLOSE)
    np.testing.assert_allclose(seen.losses, case["losses"], **golden.CLOSE)
    assert seen.iterations == [calls // 2 for calls in case["iterations_raw"]]
    # Keras records the rate of the next call: at even calls, that of our last update two calls on.
    np.testing.assert_allclose(seen.rates[3::2], case["lr"][2:-1:2], rtol=1e-6)


def run_with_average(case, without_gradient, of_keras_3):
    """Return the parameters of SGD with an average, in numpy, by the rules of Keras 2 or 3."""
    rate, momentum = (np.float32(case["kwargs"][n]) for n in ("learning_rate", "ema_momentum"))
    values = golden.flat(golden.initial_params())
    averages, rows = values, [values]
    is_bias = np.isin(np.arange(16), range(12, 15))
    for t, (x, y) in enumerate(zip(*golden.batches(), strict=True)):
        kernel, bias, scale = (jnp.asarray(part) for part in np.split(values, [12, 15]))
        params = {"dense": {"kernel": kernel.reshape(4, 3), "bias": bias}, "scale": scale[0]}
        grads = golden.flat(loss_and_grads(params, x, y)[1])
        has_gradient = ~(is_bias & without_gradient(t))
        values = np.where(has_gradient, values - rate * grads, values)
        averaged = np.full(16, True) if of_keras_3 else has_gradient
        m = np.float32(0) if of_keras_3 and t == 0 else momentum
        averages = np.where(averaged, m * averages + (1 - m) * values, averages)
        if (t + 1) % case["kwargs"]["ema_overwrite_frequency"] == 0:
            values = np.where(averaged, averages, values)
        rows.append(values)
    return np.stack(rows)


def test_the_average_is_that_of_keras_2():
    case = CASES["keras3-none_grad_masked_ema"]

    def third(t):
        return t % 3 == 2

    keras_3 = run_with_average(case, third, of_keras_3=True)
    np.testing.assert_allclose(keras_3, np.float32(case["params"]), **golden.CLOSE)
    keras_2 = run_with_average(case, third, of_keras_3=False)
    ours = Replay(optimizer_of(case), without_bias=third)
    np.testing.assert_allclose(ours.rows, keras_2, **golden.CLOSE)
    assert np.abs(keras_2 - keras_3)[3:].max() > 0.01


def test_a_dynamic_loss_scale_replays_but_does_not_count_skipped_steps():
    case = CASES["keras2-LossScaleOptimizer_SGD"]
    assert case["kwargs"] == {
        "inner": "SGD(0.1)",
        "initial_scale": 8.0,
        "dynamic_growth_steps": 3,
    }
    optimizer = ol.optimizers.LossScaleOptimizer(
        ol.optimizers.SGD(0.1), initial_scale=8.0, dynamic_growth_steps=3
    )
    made, rows, scales, counts, iterations = variables(), [], [], [], []
    optimizer.build(list(made.values()))
    kept = {v.name: v for v in optimizer.variables}
    rows.append(golden.flat(tree(made)))
    for t, (x, y) in enumerate(zip(*golden.batches(), strict=True)):
        loss, grads = loss_and_grads(tree(made), x, y)
        np.testing.assert_allclose(loss, case["losses"][t], **golden.CLOSE)
        scaled = {n: optimizer.scale_loss(g) for n, g in named(grads).items()}
        if t in (5, 11):
            scaled["dense/bias"] = jnp.full(3, jnp.inf)
        optimizer.apply_gradients([(scaled[name], v) for name, v in made.items()])
        rows.append(golden.flat(tree(made)))
        scales.append(float(kept["loss_scale/loss_scale"]))
        counts.append(int(kept["loss_scale/finite_in_a_row"]))
        iterations.append(int(optimizer.iterations))
    np.testing.assert_allclose(rows, np.float32(case["params"]), **golden.CLOSE)
    assert scales == case["scale"]
    assert counts == case["counter"]
    skipped = np.cumsum([t in (5, 11) for t in range(20)])
    assert iterations == list(np.array(case["iterations"]) - skipped)


# Configurations that Keras wrote.


def config_of(record):
    """Return the config with numpy's float32 in it, where JSON has a note."""
    rate = record["get_config"]["learning_rate"]
    noted = isinstance(rate, dict)
    return {**record["get_config"], "learning_rate": np.float32(rate["value"]) if noted else rate}


def assert_has_options(optimizer, config):
    """Check that an optimizer has the options in a config, and the defaults in all others."""
    ours, defaults = optimizer.get_config(), type(optimizer)().get_config()
    for option in config.keys() - {"is_legacy_optimizer", "learning_rate"}:
        assert ours.get(option) == config[option], option
    assert np.float32(ours["learning_rate"]) == np.float32(config["learning_rate"])
    left = ours.keys() - config.keys()
    assert {n: ours[n] for n in left} == {n: defaults[n] for n in left}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_keras_configs_are_read(name):
    cls, record = CONFIGS[name]
    config = config_of(record)
    assert_has_options(getattr(ol.optimizers, cls).from_config(config), config)
    described = record.get("serialize", {"class_name": cls, "config": config})
    optimizer = ol.optimizers.deserialize(described)
    assert type(optimizer) is getattr(ol.optimizers, cls)
    assert_has_options(optimizer, described["config"])


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_defaults_are_those_of_keras(name):
    cls, record = CONFIGS[name]
    read = getattr(ol.optimizers, cls).from_config(config_of(record)).get_config()
    defaults = getattr(ol.optimizers, cls)().get_config()
    for config in (read, defaults):
        config["learning_rate"] = np.float32(config["learning_rate"])
    different = {n for n in defaults if read[n] != defaults[n]} - {"name", "jit_compile"}
    assert different == {
        "keras3-Lion": {"learning_rate"},
        "keras3-RMSprop": {"ema_overwrite_frequency"},  # 100 in Keras 2.15
    }.get(name, set())


@pytest.mark.parametrize("name", sorted(RECORDS["keras2"]["schedules"]))
def test_schedule_configs_are_read(name):
    record = RECORDS["keras2"]["schedules"][name]
    schedule = ol.optimizers.deserialize(record["config"])
    steps = jnp.arange(len(record["values"]))
    np.testing.assert_allclose(jax.vmap(schedule)(steps), record["values"], **golden.CLOSE)
    assert ol.optimizers.deserialize(ol.optimizers.serialize(schedule)) == schedule
    optimizer = ol.optimizers.SGD.from_config({"learning_rate": record["config"]})
    assert re.match(r"SGD\(learning_rate=\w+\(", repr(optimizer))
    assert optimizer.get_config()["learning_rate"]["class_name"] == record["config"]["class_name"]


def test_legacy_configs_are_refused():
    config: dict[str, Any] = {**CONFIGS["keras2-SGD"][1]["serialize"]["config"]}
    config["is_legacy_optimizer"] = True
    with pytest.raises(ValueError, match="legacy"):
        ol.optimizers.SGD.from_config(config)
