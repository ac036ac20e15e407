"""The reference's acceptance checks 15 to 25: what the optimizers of TF1 and Keras do, in numbers.

Checks 1 to 14 are of `optimize_loss`: see `test_optimize_loss.py`. Proven elsewhere too: 15, 16 and
18 for contrib's names in the same file; 24, schedules, in `test_schedules.py` (`AT_STEPS` there has
the check's numbers); 25, the loss scale that grows and halves, in `test_golden_keras.py`.

The numbers are the reference's. Where ours differs, a test says what ours does:

17. Norms are of gradients whose duplicate rows are summed; all rows decay, as in Keras.
20. Names have no `:0`, so `^dense/bias$` matches; a pattern that matches nothing raises.
21. Two clips raise, and so do a bound of 0 or below, where Keras 2 ignores one or all.
22. The warning comes once.
23. The error for a rate that cannot be set is a `TypeError` and a `ValueError`.
25. A skipped step is not counted.
"""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss import optimizers

HALVING = ol.schedules.ExponentialDecay(0.1, decay_steps=1, decay_rate=0.5)
NAN = float("nan")


def values_after(optimizer, grads, start):
    """Return the value of one variable after every gradient."""
    v, values = ol.Variable(start, "v"), []
    for grad in grads:
        optimizer.apply_gradients([(grad, v)])
        values.append(float(v))
    return values


def assert_near(values, wanted):
    np.testing.assert_allclose(values, wanted, rtol=1e-6)


# Optimizer, and a variable after every step; before the first it is 10, and every gradient is 5.
FROM_10_BY_5 = {
    "15-momentum": (lambda: optimizers.MomentumOptimizer(0.1, 0.9), [9.5, 8.55, 7.195]),
    "15-adagrad": (lambda: optimizers.AdagradOptimizer(0.1), [9.900199, 9.829559, 9.771863]),
    "15-rmsprop": (lambda: optimizers.RMSPropOptimizer(0.1), [9.728837, 9.516789, 9.334264]),
    "15-keras-rmsprop": (lambda: optimizers.RMSprop(0.1), [9.683772, 9.454356, 9.262261]),
    "15-ftrl": (lambda: optimizers.FtrlOptimizer(0.1), [9.269005, 9.198364, 9.140668]),
    "18-rate-outside": (lambda: optimizers.MomentumOptimizer(HALVING, 0.9), [9.5, 9.025, 8.68625]),
    "18-rate-in-velocity": (lambda: optimizers.SGD(HALVING, momentum=0.9), [9.5, 8.8, 8.045]),
    "25-nadam": (lambda: optimizers.Nadam(0.1), [9.893722, 9.816362, 9.745229]),
}


@pytest.mark.parametrize("name", FROM_10_BY_5)
def test_values(name):
    make, after = FROM_10_BY_5[name]
    assert_near(values_after(make(), [5.0] * 3, 10.0), after)


@pytest.mark.parametrize("cls", [optimizers.AdamOptimizer, optimizers.Adam])
def test_16_epsilon_is_added_to_the_root_that_is_not_corrected(cls):
    after = values_after(cls(0.1, epsilon=0.1), [1.0] * 3, 10.0)
    assert_near(after, [9.975975, 9.945079, 9.909701])


@pytest.mark.parametrize("noise", [None, 0.0])
def test_17_norms_are_of_summed_rows(noise):
    # Of rows a, a, b with a² = 1/2, b² = 3.02, TF reports √(a² + a² + b²) = 2.0049937 without noise
    # and √((2a)² + b²) = 2.2405357 with noise of scale 0.
    slopes = jnp.float32([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.1, 0.9, 1.0]])
    step = ol.optimize_loss(
        lambda params: jnp.sum(params["emb"][jnp.array([1, 1, 3])] * slopes),
        learning_rate=0.1,
        optimizer="SGD",
        gradient_noise_scale=noise,
        summaries=["global_gradient_norm"],
    )
    _, metrics = step(step.init({"emb": jnp.zeros((4, 3), jnp.float32)}))
    assert_near(metrics["global_norm/gradient_norm"], 2.2405357)


@pytest.mark.parametrize(
    "optimizer",
    [
        optimizers.MomentumOptimizer(0.1, 0.9),
        optimizers.RMSPropOptimizer(0.1, momentum=0.9),
        optimizers.AdamOptimizer(0.1),
        optimizers.SGD(0.1, momentum=0.9),
        optimizers.Adam(0.1),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_17_all_rows_decay(optimizer):
    first, then = jnp.float32([[1.0], [0.0]]), jnp.float32([[0.0], [1.0]])
    table = ol.Variable(np.ones((2, 1), np.float32), "table")
    optimizer.apply_gradients([(first, table)])
    before = float(table[0, 0])
    optimizer.apply_gradients([(then, table)])
    assert float(table[0, 0]) < before  # TF1 leaves it where it is, but for Adam


def test_19_the_average_starts_at_the_initial_value():
    optimizer = optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3)
    v, values, averages = ol.Variable(2.0, "v"), [], []
    for _ in range(4):
        optimizer.apply_gradients([(1.0, v)])
        values.append(float(v))
        averages += [float(x) for x in optimizer.variables if x.name == "ema/average/v"]
    assert_near(values, [1.0, 0.0, -0.125, -1.125])  # Keras 3: -0.25 and -1.25 at last
    assert_near(averages, [1.5, 0.75, -0.125, -0.625])


def test_20_decay_comes_first():
    for cls, after in ((optimizers.SGD, 0.85), (optimizers.Ftrl, 0.5682179)):
        assert_near(values_after(cls(0.1, weight_decay=0.5), [1.0], 1.0), [after])


def decayed(*patterns):
    """Return whether kernel and bias were decayed, after one call for each list of patterns."""
    optimizer = optimizers.SGD(0.1, weight_decay=0.5)
    for texts in patterns:
        optimizer.exclude_from_weight_decay(var_names=texts)
    kernel, bias = ol.Variable(1.0, "dense/kernel"), ol.Variable(1.0, "dense/bias")
    optimizer.apply_gradients([(1.0, kernel), (1.0, bias)])
    lost = [round(1.0 - float(v), 6) for v in (kernel, bias)]
    assert set(lost) <= {0.1, 0.15}
    return tuple(x == 0.15 for x in lost)


# Lists of patterns, and whether kernel and bias are decayed.
EXCLUSIONS = {
    "searched": ([["bias"]], (True, False)),
    "whole-name": ([["^dense/bias$"]], (True, False)),
    "with-the-number-of-tensorflow": ([["^dense/bias:0$"]], (True, False)),
    "compiled": ([[re.compile("nel$")]], (False, True)),
    "empty-text-is-found-in-all": ([[""]], (False, False)),
    "second-call-replaces-the-first": ([["bias"], ["kernel"]], (False, True)),
    "second-call-takes-back": ([["bias"], []], (True, True)),
}


@pytest.mark.parametrize("name", EXCLUSIONS)
def test_20_exclusions(name):
    patterns, wanted = EXCLUSIONS[name]
    assert decayed(*patterns) == wanted


@pytest.mark.parametrize("text", ["bais", "Bias", "^bias"])
def test_20_a_pattern_that_matches_nothing_raises(text):
    with pytest.raises(ValueError, match=f"(?s){re.escape(text)}.*dense/bias"):
        decayed([text])


def test_20_too_late():
    optimizer = optimizers.SGD(0.1, weight_decay=0.5)
    optimizer.build([ol.Variable(1.0, "v")])
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["v"])


def sgd(**options: Any):
    return optimizers.SGD(0.1, **options)


CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")


@pytest.mark.parametrize("pair", [CLIPS[:2], CLIPS[1:], CLIPS[::2]], ids=" and ".join)
def test_21_two_clips_raise(pair):
    with pytest.raises(ValueError, match=r"At most one of .*Received: .*1\.0.*2\.0"):
        sgd(**dict(zip(pair, (1.0, 2.0), strict=True)))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bound", [0.0, -1.0])
def test_21_a_bound_must_be_above_0(clip, bound):
    with pytest.raises(ValueError, match=f"`{clip}` must be above 0. Received: {clip}={bound}"):
        sgd(**{clip: bound})


@pytest.mark.parametrize(
    ("clip", "finite", "infinite"),
    [("global_clipnorm", NAN, NAN), ("clipnorm", 0.9, NAN), ("clipvalue", 0.9, 0.9)],
)
def test_21_infinite_gradients(clip, finite, infinite):
    v, w = ol.Variable([1.0, 1.0], "v"), ol.Variable(1.0, "w")
    grads = jnp.float32([jnp.inf, 0.0]), 2.0
    sgd(**{clip: 1.0}).apply_gradients(zip(grads, [v, w], strict=True))
    assert_near([w.numpy(), v[0]], [finite, infinite])


def test_22_gradients_of_none():
    optimizer = optimizers.Adam(0.1, weight_decay=0.5, use_ema=True, ema_overwrite_frequency=1)
    v, w = ol.Variable(1.0, "v"), ol.Variable(1.0, "w")
    optimizer.build([v, w])
    before = {x.name: float(x) for x in optimizer.variables if x.name.endswith("/w")}
    with pytest.warns(UserWarning, match=r"no gradient for \['w'\]") as warned:
        optimizer.apply_gradients([(1.0, v), (None, w)])
    assert len(warned) == 1
    assert float(w) == 1.0
    assert float(v) != 1.0
    after = {x.name: float(x) for x in optimizer.variables if x.name.endswith("/w")}
    assert before == after
    assert before.keys() == {"adam/m/w", "adam/v/w", "ema/average/w"}
    assert int(optimizer.iterations) == 1


def test_22_bias_correction_counts_the_updates_of_all():
    optimizer = optimizers.Adam(0.1)
    v, w = ol.Variable(1.0, "v"), ol.Variable(1.0, "w")
    with pytest.warns(UserWarning, match="no gradient"):
        optimizer.apply_gradients([(1.0, v), (None, w)])
    optimizer.apply_gradients([(1.0, v), (1.0, w)])
    assert_near(float(w), 0.9255873)


def test_22_no_gradients():
    optimizer, v = optimizers.Adam(0.1), ol.Variable(1.0, "v")
    assert int(optimizer.apply_gradients([])) == 0
    with pytest.raises(ValueError, match=r"No gradients: .*Parameters: \['v'\]"):
        optimizer.apply_gradients([(None, v)])
    assert (int(optimizer.iterations), float(v)) == (0, 1.0)


def test_23_the_rate_of_a_schedule_is_the_one_last_used():
    schedule = ol.schedules.ExponentialDecay(0.2, decay_steps=1, decay_rate=0.5)
    optimizer, v = optimizers.SGD(schedule), ol.Variable(1.0, "v")
    rates = [float(optimizer.learning_rate)]
    for _ in range(3):
        optimizer.apply_gradients([(1.0, v)])
        rates.append(float(optimizer.learning_rate))
    assert_near(rates, [0.2, 0.2, 0.1, 0.05])
    with pytest.raises(TypeError, match="must stay a schedule") as raised:
        optimizer.learning_rate = 0.1
    assert isinstance(raised.value, ValueError)
    optimizer.learning_rate = ol.schedules.ExponentialDecay(8.0, decay_steps=1, decay_rate=0.5)
    optimizer.apply_gradients([(0.0, v)])
    assert float(optimizer.learning_rate) == 1.0


def test_23_a_rate_can_be_set_or_become_a_schedule():
    optimizer, v = optimizers.SGD(0.25), ol.Variable(4.0, "v")
    optimizer.apply_gradients([(1.0, v)])
    optimizer.learning_rate = 0.5
    optimizer.apply_gradients([(1.0, v)])
    assert (float(v), float(optimizer.learning_rate)) == (3.25, 0.5)
    optimizer.learning_rate = ol.schedules.PiecewiseConstantDecay([2], [8.0, 2.0])
    optimizer.apply_gradients([(1.0, v)])
    assert (float(v), float(optimizer.learning_rate)) == (-4.75, 8.0)
    optimizer.apply_gradients([(1.0, v)])
    assert (float(v), float(optimizer.learning_rate)) == (-6.75, 2.0)


def test_25_skipped_steps_are_not_counted_and_the_scale_stays_at_least_1():
    optimizer = optimizers.LossScaleOptimizer(optimizers.SGD(0.5), 2.0, dynamic_growth_steps=2)
    v = ol.Variable(1.0, "v")
    optimizer.build([v])
    (scale,) = [x for x in optimizer.variables if x.name == "loss_scale/loss_scale"]
    seen = []
    for grad in [jnp.inf, NAN, -jnp.inf, 1.0, 1.0, 1.0]:
        optimizer.apply_gradients([(grad, v)])
        seen.append((int(optimizer.iterations), float(scale), float(v)))
    skipped = [(0, 1.0, 1.0)] * 3
    assert seen == [*skipped, (1, 1.0, 0.5), (2, 2.0, 0.0), (3, 2.0, -0.25)]
