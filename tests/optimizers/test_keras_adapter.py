"""`KerasOptimizer` shows and does what Keras 3's own optimizers show and do."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import optimize_loss as ol
from optimize_loss import optimizers as optim
from optimize_loss import transforms as T
from optimize_loss.keras import KerasOptimizer

# Keras' variables make copies for numpy as numpy 1 asked for them.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

theirs: Any = keras.optimizers
# For type checkers it has only the attributes of its class.
adapted: Any = KerasOptimizer


def fitted(optimizer, callbacks=(), epochs=1, validate=False):
    """Return a model of two layers after epochs of 8 batches."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(2, name="first"), keras.layers.Dense(1, name="second")]
    model: Any = keras.Sequential([keras.Input((3,)), *layers])
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    data = x, np.sin(x.sum(1, keepdims=True))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model.compile(optimizer=optimizer, loss="mse")
        options = {"verbose": 0, "shuffle": False, "callbacks": list(callbacks)}
        options |= {"validation_data": data} if validate else {}
        model.fit(*data, 2, epochs, **options)
    return model


def assert_same(got, wanted, tolerance=1e-5):
    for a, b in zip(got.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, tolerance, tolerance)
    for name, values in wanted.history.history.items():
        found = got.history.history[name]
        np.testing.assert_allclose(found, values, tolerance, err_msg=name)


# The average.

AVERAGED = {
    "plain": {"momentum": 0.9},
    "overwriting": {"ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    "all-old": {"ema_momentum": 1.0},
    "all-new": {"ema_momentum": 0.0, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", AVERAGED)
def test_the_average_starts_as_that_of_keras(name):
    options = {"learning_rate": 0.1, "use_ema": True, **AVERAGED[name]}
    got = fitted(KerasOptimizer(optim.SGD(**options)), epochs=2)
    assert_same(got, fitted(theirs.SGD(**options), epochs=2))


def test_the_class_and_a_chain_keep_their_start():
    links = {"rate": T.ScaleByLearningRate(0.5), "ema": T.AverageParams(0.75)}
    for given, average in (
        (optim.SGD(0.5, use_ema=True, ema_momentum=0.75), 3.5),
        (T.chain(**links), 3.875),
    ):
        v = keras.Variable(4.0, name="v")
        optimizer = KerasOptimizer(given)
        optimizer.apply([jnp.float32(1.0)], [v])
        optimizer.finalize_variable_values([v])
        assert float(v.value) == average
    v = ol.Variable(4.0, "v")
    own = optim.SGD(0.5, use_ema=True, ema_momentum=0.75)
    own.apply_gradients([(1.0, v)])
    own.finalize_variable_values([v])
    assert float(v) == 3.875


@pytest.mark.parametrize("swap_on_epoch", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_averages_are_swapped_in_for_evaluation(policy, swap_on_epoch, in_policy):
    options = {"learning_rate": 0.1, "use_ema": True, "ema_momentum": 0.8}
    got, wanted = (
        fitted(made, [keras.callbacks.SwapEMAWeights(swap_on_epoch)], 2, validate=True)
        for made in (KerasOptimizer(optim.SGD(**options)), theirs.SGD(**options))
    )
    assert_same(got, wanted, 1e-5 if policy == "float32" else 1e-3)


@pytest.fixture
def in_policy(policy):
    before = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy(policy)
    yield
    keras.mixed_precision.set_dtype_policy(before)


def test_without_averages_there_is_nothing_to_swap():
    with pytest.raises(ValueError, match=r"`use_ema=True` is set on the optimizer. Received: use_"):
        fitted(KerasOptimizer(optim.SGD(0.1)), [keras.callbacks.SwapEMAWeights()], validate=True)


# What shows.

OPTIONS = {
    "weight_decay": 0.125,
    "global_clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.75,
    "ema_overwrite_frequency": 3,
    "loss_scale_factor": 4.0,
    "gradient_accumulation_steps": 2,
    "beta_1": 0.5,
    "epsilon": 1e-3,
    "amsgrad": True,
}
SHARED = [*OPTIONS, "clipnorm", "clipvalue"]


def shown(optimizer):
    return {name: getattr(optimizer, name) for name in SHARED}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "all"])
def test_options_show_as_those_of_keras(options):
    ours, other = adapted(optim.Adam(**options)), theirs.Adam(**options)
    for _ in range(2):
        assert shown(ours) == shown(other)
        for made in (ours, other):
            made.build([keras.Variable(1.0, name="v")])
    assert float(ours.scale_loss(1.0)) == float(other.scale_loss(1.0))
    of_the_outer = {n: x for n, x in OPTIONS.items() if n != "loss_scale_factor"}
    assert shown(adapted(optim.LossScaleOptimizer(optim.Adam(**of_the_outer)))) == {
        **dict.fromkeys(SHARED),
        **of_the_outer,
    }


def test_what_keras_has_in_public_is_here():
    names = {n for n in dir(theirs.SGD(0.1)) if not n.startswith("_")}
    assert [n for n in names if not hasattr(adapted(optim.SGD(0.1)), n)] == []


def test_a_chain_shows_what_its_links_do():
    links = {
        "accumulate": T.Accumulate(4),
        "clip": T.ClipByNorm(0.5),
        "weight_decay": T.ShrinkParams(0.25),
        "rate": T.ScaleByLearningRate(0.1),
        "ema": T.AverageParams(0.75),
    }
    made = adapted(T.chain(**links))
    found = (made.gradient_accumulation_steps, made.clipnorm, made.weight_decay)
    assert found == (4, 0.5, 0.25)
    assert (made.use_ema, made.ema_momentum, made.clipvalue) == (True, 0.75, None)
    assert (adapted(optax.adam(0.1)).use_ema, adapted(optax.adam(0.1)).ema_momentum) == (
        False,
        0.99,
    )
    with pytest.raises(AttributeError, match="`clipnorm` must be given to the links"):
        made.clipnorm = 1.0


@pytest.mark.parametrize("given", [optim.AdamW(0.1), "AdamW", optim.AdamW], ids=str)
def test_options_can_be_set_until_it_is_built(given):
    made = adapted(given, None if isinstance(given, optim.AdamW) else 0.1)
    made.weight_decay, made.beta_1 = 0.25, 0.5
    made.lr = jnp.float32(0.2)
    again = KerasOptimizer.from_config(made.get_config())
    assert again.weight_decay == made.weight_decay == 0.25
    with pytest.raises(ValueError, match="`clipnorm` must be above 0"):
        made.clipnorm = -1.0
    v, w = (keras.Variable(4.0, name="v") for _ in range(2))
    other = theirs.AdamW(0.2, weight_decay=0.25, beta_1=0.5)
    for optimizer, box in ((made, v), (other, w)):
        optimizer.apply([jnp.float32(1.0)], [box])
    np.testing.assert_allclose(v.numpy(), w.numpy(), 1e-6)
    with pytest.raises(ValueError, match="`weight_decay` must be set before the optimizer is bui"):
        made.weight_decay = 0.5
    with pytest.raises(AttributeError, match=r"`weight_decy` is not .*mean `weight_decay`"):
        made.weight_decy = 0.5
    assert made.lr is made.learning_rate


@pytest.mark.parametrize("scaled", [{}, {"loss_scale_factor": 8.0}], ids=["plain", "scaled"])
def test_numbers_and_arrays_are_scaled(scaled):
    made, factor = adapted(optim.SGD(0.1, **scaled)), scaled.get("loss_scale_factor", 1.0)
    for _ in range(2):
        for loss in (1.0, 1, np.float32(1), np.float64(1), jnp.bfloat16(1), keras.Variable(1.0)):
            assert float(made.scale_loss(loss)) == factor
        assert made.scale_loss(jnp.float16(1)).dtype == jnp.float16
        made.build([keras.Variable(1.0, name="v")])
    dynamic = adapted(optim.LossScaleOptimizer(optim.SGD(0.1), 2.0))
    assert float(dynamic.scale_loss(1.0)) == 2.0


def test_a_fixed_loss_scale_divides_once():
    made = [f(optim.SGD, optim.Adam) for f in (adapted_pair, keras_pair)]
    v, w = ([keras.Variable(4.0, name=n) for n in ("v", "w")] for _ in range(2))
    for optimizer, boxes in zip(made, (v, w), strict=True):
        optimizer.apply([jnp.float32(8.0)] * 2, boxes)
    for a, b in zip(v, w, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), 1e-6)


def adapted_pair(*classes):
    """Adapters inside of Keras' own `MultiOptimizer`, which gives them its loss scale."""
    first, second = (KerasOptimizer(cls(0.1)) for cls in classes)
    return theirs.MultiOptimizer(theirs.OptimizerMap(second, {"v": first}), 8.0)


def keras_pair(*classes):
    first, second = (getattr(theirs, cls.__name__)(0.1) for cls in classes)
    return theirs.MultiOptimizer(theirs.OptimizerMap(second, {"v": first}), 8.0)


# Many optimizers.


def many():
    first = optim.SGD(0.1, momentum=0.5, use_ema=True, ema_momentum=0.8, name="sgd")
    return optim.MultiOptimizer({"**/first/*": first}, optim.Adam(0.01, name="adam"))


def many_of_keras():
    first = theirs.SGD(0.1, momentum=0.5, use_ema=True, ema_momentum=0.8, name="sgd")
    default = theirs.Adam(0.01, name="adam")
    return theirs.MultiOptimizer(theirs.OptimizerMap(default, {".*/first/.*": first}))


def halved(epoch, rate):
    return rate / 2


CALLBACKS = {
    "scheduler": lambda: keras.callbacks.LearningRateScheduler(halved),
    "plateau": lambda: keras.callbacks.ReduceLROnPlateau("loss", 0.1, 1, min_delta=10.0),
    "swap": lambda: keras.callbacks.SwapEMAWeights(),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_reach_each_of_many_optimizers(name):
    got, wanted = (
        fitted(made, [CALLBACKS[name]()], 3, validate=True)
        for made in (KerasOptimizer(many()), many_of_keras())
    )
    assert_same(got, wanted)


@pytest.mark.parametrize("name", ["scheduler", "plateau"])
def test_callbacks_reach_the_rate_that_optax_injects(name):
    tx = optax.chain(optax.clip(0.5), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    got, wanted = (
        fitted(KerasOptimizer(given), [CALLBACKS[name]()], 3)
        for given in (tx, optim.SGD(0.1, clipvalue=0.5))
    )
    assert_same(got, wanted)
    got.optimizer.lr = None  # as it was built
    assert float(got.optimizer.learning_rate.value) == np.float32(0.1)


def test_a_rate_that_optax_schedules_is_not_shown():
    schedule = optax.constant_schedule(0.1)
    made = adapted(optax.inject_hyperparams(optax.sgd)(learning_rate=schedule))
    made.build([keras.Variable(1.0, name="v")])
    assert not hasattr(made, "learning_rate")


def test_many_optimizers_go_on_from_a_file(tmp_path):
    model = fitted(KerasOptimizer(many()), [CALLBACKS["scheduler"]()])
    model.save(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras")
    rates = [[float(x.learning_rate.value) for x in m.optimizer.optimizers] for m in (model, again)]
    np.testing.assert_allclose(rates, [[0.05, 0.005]] * 2)
    for a, b in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_each_part_shows_its_own():
    made = adapted(many())
    sgd, adam = made.optimizers
    assert (sgd.name, adam.name) == ("sgd", "adam")
    assert (sgd.use_ema, adam.use_ema, made.use_ema) == (True, False, False)
    assert (sgd.momentum, adam.beta_1, adam.weight_decay) == (0.5, 0.9, None)
    adam.learning_rate = 0.5
    assert [float(x.learning_rate.value) for x in made.optimizers] == pytest.approx([0.1, 0.5])
    with pytest.raises(ValueError, match="`learning_rate` must be at least 0"):
        sgd.learning_rate = -1.0
    assert not hasattr(adapted(optim.SGD(0.1)), "optimizers")
    assert not hasattr(made, "learning_rate")
    assert not hasattr(sgd, "_model_variables_moving_average")


def test_a_schedule_inside_and_averages_outside():
    schedule = ol.schedules.ExponentialDecay(0.5, 1, 0.5)
    inner = optim.MultiOptimizer({"v": optim.SGD(schedule)}, optim.Lion(0.1), use_ema=True)
    made, v = adapted(inner), keras.Variable(4.0, name="v")
    w = keras.Variable(4.0, name="w")
    made.apply([jnp.float32(1.0)] * 2, [v, w])
    first, second = made.optimizers
    assert float(first.learning_rate) == 0.25
    assert (first.use_ema, second.use_ema) == (True, True)
    assert first._trainable_variables == [v]
    assert [float(x.value) for x in second._model_variables_moving_average] == [float(w.value)]


# Under a policy of mixed precision, Keras puts its own loss scale around.

UNDER_A_POLICY = {
    "adam": (
        lambda: optim.Adam(0.01, weight_decay=0.1),
        lambda: theirs.Adam(0.01, weight_decay=0.1),
    ),
    "averages": (
        lambda: optim.Adam(0.01, use_ema=True, ema_momentum=0.8),
        lambda: theirs.Adam(0.01, use_ema=True, ema_momentum=0.8),
    ),
    "accumulation": (
        lambda: optim.Adam(0.01, gradient_accumulation_steps=2),
        lambda: theirs.Adam(0.01, gradient_accumulation_steps=2),
    ),
    "many": (many, many_of_keras),
}


@pytest.mark.parametrize("policy", ["mixed_float16"])
@pytest.mark.parametrize("name", UNDER_A_POLICY)
def test_a_policy_of_mixed_precision(name, policy, in_policy):
    ours, other = UNDER_A_POLICY[name]
    got, wanted = fitted(KerasOptimizer(ours()), epochs=2), fitted(other(), epochs=2)
    assert type(got.optimizer) is theirs.LossScaleOptimizer
    assert_same(got, wanted, 5e-3)
    assert int(got.optimizer.iterations) == int(wanted.optimizer.iterations)


def test_a_name_takes_exclusions_and_a_chain_says_where_they_go():
    made, v = adapted("AdamW", 0.5), keras.Variable(4.0, name="v")
    made.exclude_from_weight_decay(var_list=[v])
    made.apply([jnp.float32(0.0)], [v])
    assert float(v.value) == 4.0
    with pytest.raises(ValueError, match="in a chain, give `exclude` to the link that decays"):
        adapted(optax.adam(0.1)).exclude_from_weight_decay(var_names=["v"])
