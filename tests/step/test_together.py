"""Several losses in one step: what a loop written by hand gives, bit for bit, in one program."""

import functools
import json
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optimize_loss
from optimize_loss._random import name_words
from tests.cases import on_eight_devices

ol: Any = optimize_loss  # untyped, since some of what these tests pass is wrong on purpose
T = ol.transforms


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def key_of(name, updates, seed=0):
    """The key of an update of a step of this name."""
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(name_words(name)[0]))
    return jax.random.fold_in(key, updates)


# A WGAN: the critic is clipped to a box after each of five updates, then the generator moves once.


def scores(critic, x):
    return jnp.tanh(x @ critic["w"] + critic["b"][None, :]).mean()


def drawn(generator, key, count):
    z = jax.random.normal(key, (count, 2))
    return z @ generator["w"] + generator["b"][None, :]


def critic_loss(params, x, *, key):
    fake = drawn(params["generator"], key, len(x))
    return scores(params["critic"], fake) - scores(params["critic"], x)


def generator_loss(params, x, *, key):
    return -scores(params["critic"], drawn(params["generator"], key, len(x)))


def gan_params():
    k = jax.random.key(3)
    return {
        "critic": {"w": 0.05 * jax.random.normal(k, (2, 4)), "b": jnp.zeros(4)},
        "generator": {"w": jnp.eye(2), "b": jnp.zeros(2)},
    }


def clipped(bound):
    """Keep parameters within a box: what moves them further is left out."""

    def update(updates, state, params=None):
        kept = jax.tree.map(lambda p, u: jnp.clip(p + u, -bound, bound) - p, params, updates)
        return kept, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def rmsprop():
    return optax.chain(optax.rmsprop(5e-2), clipped(0.1))


BATCHES = jax.random.normal(jax.random.key(1), (12, 8, 2)) + 2.0


def wgan(every=5):
    critic = ol.optimize_loss(critic_loss, optimizer=rmsprop(), variables="critic/**")
    generator = ol.optimize_loss(
        generator_loss, optimizer=optax.adam(1e-2), variables="generator/**"
    )
    return ol.together(critic=critic, generator=generator, every={"generator": every})


def by_hand(batches, every=5):
    """Two optimizers of optax, in turn."""

    @jax.jit
    def critic_step(params, state, x, key):
        loss = lambda own: critic_loss({**params, "critic": own}, x, key=key)
        value, grads = jax.value_and_grad(loss)(params["critic"])
        updates, state = rmsprop().update(grads, state, params["critic"])
        return {**params, "critic": optax.apply_updates(params["critic"], updates)}, state, value

    @jax.jit
    def generator_step(params, state, x, key):
        loss = lambda own: generator_loss({**params, "generator": own}, x, key=key)
        value, grads = jax.value_and_grad(loss)(params["generator"])
        updates, state = optax.adam(1e-2).update(grads, state, params["generator"])
        own = optax.apply_updates(params["generator"], updates)
        return {**params, "generator": own}, state, value

    params, losses = gan_params(), {"critic/loss": [], "generator/loss": []}
    of_critic = rmsprop().init(params["critic"])
    of_generator = optax.adam(1e-2).init(params["generator"])
    for i, x in enumerate(batches):
        params, of_critic, loss = critic_step(params, of_critic, x, key_of("critic", i))
        losses["critic/loss"].append(loss)
        loss = jnp.nan
        if (i + 1) % every == 0:
            key = key_of("generator", i // every)
            params, of_generator, loss = generator_step(params, of_generator, x, key)
        losses["generator/loss"].append(loss)
    return params, {name: np.stack(x) for name, x in losses.items()}


@pytest.fixture(scope="module")
def loose():
    """As users run: optax's Adam multiplies floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trained(loose):
    """A WGAN after all batches, by single steps."""
    step = wgan()
    state = step.init(gan_params())
    each = []
    for x in BATCHES:
        state, metrics = step(state, x)
        each.append(metrics)
    return step, state, {tag: np.stack([m[tag] for m in each]) for tag in each[0]}


def test_a_wgan_is_a_loop_over_two_optimizers(trained, loose):
    _, state, metrics = trained
    params, losses = by_hand(BATCHES)
    same(state.params, params)
    assert np.abs(params["critic"]["w"]).max() == np.float32(0.1)  # the box is reached
    for tag, expected in losses.items():
        np.testing.assert_array_equal(metrics[tag], expected)
    assert np.isnan(metrics["generator/loss"]).tolist() == [i % 5 != 4 for i in range(12)]
    assert state.step == 12


def test_many_and_run_are_single_steps(trained):
    step, state, metrics = trained
    again, stacked = step.many(step.init(gan_params()), BATCHES)
    same(again.params, state.params)
    same(again.optimizer, state.optimizer)
    same(stacked, metrics)
    again, all_metrics = step.run(
        step.init(gan_params()), list(BATCHES), steps_per_call=12, progress=True
    )
    same(again.optimizer, state.optimizer)
    same(all_metrics, metrics)


def test_a_file_goes_on_in_the_middle_of_a_turn(trained, tmp_path):
    step, state, _ = trained
    early, _ = step.run(step.init(gan_params()), list(BATCHES[:7]))
    ol.save(tmp_path / "a.safetensors", early)
    again, report = ol.restore(tmp_path / "a.safetensors", step.init(gan_params()), strict=True)
    assert not report.new
    assert not report.unused
    again, _ = step.run(again, list(BATCHES[7:]))
    same(again.params, state.params)
    same(again.optimizer, state.optimizer)
    copied = ol.from_state_dict(step.init(gan_params()), ol.to_state_dict(again))
    same(copied.optimizer, again.optimizer)


def test_a_pickled_step_is_the_same_step():
    step = pickle.loads(pickle.dumps(ol.together(a=quadratic("a"), b=quadratic("b"))))
    state, metrics = step(step.init({"a": 2.0, "b": 4.0}), 1.0)
    assert state.params == {"a": 1.5, "b": 2.5}
    assert metrics["b/loss"] == 4.5


# One loss for each of two numbers: (p - x)² / 2, whose gradient is p - x.


def half_square(params, x, name):
    return (params[name] - x) ** 2 / 2


def quadratic(name, **options):
    options = {"learning_rate": 0.5, "optimizer": "SGD", "variables": name} | options
    return ol.optimize_loss(functools.partial(half_square, name=name), **options)


def test_alone_it_is_the_step_itself():
    """With a guard, an accumulation, a schedule and an average."""

    def loss(params, x):
        return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)

    one = ol.optimize_loss(
        loss,
        learning_rate=ol.schedules.CosineDecay(0.1, 4),
        optimizer="AdamW",
        clip_gradients=0.5,
        skip="nonfinite",
        accumulate=2,
        ema=0.9,
    )
    alone = ol.together(main=one)
    x = np.ones((7, 3, 2), np.float32)
    x[3, 1, 1] = np.nan
    start = {"w": jnp.ones(2), "b": jnp.float32(0)}
    expected, metrics = one.many(one.init(start), x)
    state, own = alone.many(alone.init(start), x)
    same(state.params, expected.params)
    same(state.eval_params, expected.eval_params)
    assert state.step == expected.step == 3
    same(own.pop("batches"), metrics.pop("batches"))
    same(own, {f"main/{tag}": value for tag, value in metrics.items()})
    assert state.offender == expected.offender is not None


def test_each_sees_what_those_before_have_left():
    """BYOL's target follows the online parameters: t + (1-τ)(o - t), after these have moved."""

    def online(p, x):
        return jnp.sum((p["online"]["w"] - jax.lax.stop_gradient(p["target"]["w"]) - x) ** 2) / 2

    def follow(p, x):
        o = jax.lax.stop_gradient(p["online"]["w"])
        return jnp.sum((p["target"]["w"] - o) ** 2) / 2

    def built(loss, rate, own):
        return ol.optimize_loss(
            loss, learning_rate=rate, optimizer="SGD", variables=f"{own}/**", summaries=["loss"]
        )

    step = ol.together(online=built(online, 0.5, "online"), target=built(follow, 0.25, "target"))
    start = {"online": {"w": jnp.array([1.0, 3.0])}, "target": {"w": jnp.zeros(2)}}
    state = step.init(start)
    o, t = np.array([1.0, 3.0], np.float32), np.zeros(2, np.float32)
    for x in (2.0, -1.0, 0.5):
        o = o - np.float32(0.5) * (o - t - np.float32(x))
        t = t + np.float32(0.25) * (o - t)
        state, _ = step(state, x)
    np.testing.assert_array_equal(state.params["online"]["w"], o)
    np.testing.assert_array_equal(state.params["target"]["w"], t)


def test_an_actor_and_a_critic_that_share_a_body(loose):
    """Both losses move the body, each with slots of its own, by Adam of optax."""

    def of_critic(p, x, r):
        return jnp.mean((jnp.tanh(x @ p["body"]) @ p["value"] - r) ** 2)

    def of_actor(p, x, r):
        h = jnp.tanh(x @ p["body"])
        gain = jax.lax.stop_gradient(r - h @ p["value"])
        return -jnp.mean(jax.nn.log_softmax(h @ p["policy"])[:, 0] * gain)

    own = {"critic": ("body", "value"), "actor": ("body", "policy")}
    losses = {"critic": of_critic, "actor": of_actor}
    step = ol.together(**{
        name: ol.optimize_loss(losses[name], optimizer=optax.adam(0.01), variables=own[name])
        for name in own
    })  # fmt: skip
    k = jax.random.split(jax.random.key(0), 5)
    shapes = {"body": (3, 4), "policy": (4, 2), "value": (4,)}
    start = {
        n: jax.random.normal(key, shape)
        for key, (n, shape) in zip(k[:3], shapes.items(), strict=True)
    }
    x, r = jax.random.normal(k[3], (4, 6, 3)), jax.random.normal(k[4], (4, 6))

    tx, params = optax.adam(0.01), start
    states = {n: tx.init({name: start[name] for name in own[n]}) for n in own}

    @jax.jit
    def by_hand(params, states, x, r):
        states = dict(states)
        for name, loss in losses.items():
            mine = {n: params[n] for n in own[name]}
            grads = jax.grad(lambda mine, p, f: f({**p, **mine}, x, r))(mine, params, loss)
            updates, states[name] = tx.update(grads, states[name], mine)
            params = {**params, **jax.tree.map(jnp.add, mine, updates)}
        return params, states

    state = step.init(start)
    for i in range(4):
        state, _ = step(state, x[i], r[i])
        params, states = by_hand(params, states, x[i], r[i])
    same(state.params, params)


def test_numbers_of_each_are_set_by_the_name_of_its_links():
    step = ol.together(a=quadratic("a"), b=quadratic("b"), every={"b": 3})
    state = step.init({"a": 8.0, "b": 8.0})
    with pytest.raises(ValueError, match=re.escape("['a.rate/learning_rate', 'b.rate/learning_")):
        state.set(learning_rate=0.1)
    state = state.set(**{"a.rate/learning_rate": 0.25, "b.turn/every": 2})
    state, metrics = step.many(state, jnp.zeros(4))
    assert state.params == {"a": 8 * 0.75**4, "b": 2.0}
    np.testing.assert_array_equal(metrics["b/learning_rate"], [np.nan, 0.5, np.nan, 0.5])


def test_the_global_step_is_that_of_those_that_increment_it():
    """As contrib's: with `increment_global_step=False` in all but one, it counts that one."""
    both = ol.together(a=quadratic("a"), b=quadratic("b"), every={"b": 2})
    state, _ = both.many(both.init({"a": 1.0, "b": 1.0}), jnp.zeros(5))
    assert state.step == 5
    rate = ol.schedules.PiecewiseConstantDecay([0], [0.5, 0.0])  # only at step 0
    one = ol.together(
        a=quadratic("a", increment_global_step=False, learning_rate=rate),
        b=quadratic("b"),
        every={"b": 2},
    )
    state, _ = one.many(one.init({"a": 1.0, "b": 1.0}), jnp.zeros(5))
    assert state.step == 2
    assert state.params["a"] == 0.25  # of five updates, two were before the global step moved


def test_rules_reset_and_averages_are_for_the_parameters_of_each():
    """Small parameters share arrays, so that slots are taken apart and put together."""
    options = {"optimizer": "Adam", "learning_rate": 0.1, "ema": 0.5, "accumulate": 2}

    def built(own, **more):
        loss = lambda p, x: sum(jnp.sum((p[own][n] - x) ** 2) for n in p[own])
        return ol.optimize_loss(loss, variables=f"{own}/**", **options, **more)

    frozen = {"two/c": {"freeze": True}}
    step = ol.together(one=built("one"), two=built("two", rules=frozen))
    start = {
        "one": {"a": jnp.ones(2), "b": jnp.zeros(3)},
        "two": {"a": jnp.ones(2), "b": jnp.zeros(3), "c": jnp.ones(2)},
    }
    state, _ = step.many(step.init(start), jnp.zeros(2) + 5.0)
    same(state.params["two"]["c"], start["two"]["c"])
    assert state.optimizer["one.adam"]["m"]["two"]["a"] is None
    again = state.reset("one/a")
    assert not np.any(again.optimizer["one.adam"]["m"]["one"]["a"])
    same(again.optimizer["one.adam"]["m"]["one"]["b"], state.optimizer["one.adam"]["m"]["one"]["b"])
    same(again.optimizer["two.adam"], state.optimizer["two.adam"])
    same(jax.tree.structure(again), jax.tree.structure(state))
    same(state.eval_params, state.params)  # after one update, the newest weigh all
    state, _ = step.many(again, jnp.zeros(2) + 5.0)
    assert float(state.eval_params["two"]["a"][0]) != float(state.params["two"]["a"][0])


def test_a_guard_of_one_leaves_the_other_alone():
    guarded = quadratic("a", skip=T.SkipNonFinite(most=2))
    step = ol.together(
        b=ol.optimize_loss(lambda p, x: p["b"], learning_rate=1.0, optimizer="SGD", variables="b"),
        a=guarded,
    )
    bad = [1.0, np.nan, np.nan, 1.0]
    with pytest.raises(ol.NonFiniteError, match="2 batches in a row") as caught:
        step.run(step.init({"a": 0.0, "b": 0.0}), bad)
    state = caught.value.state
    assert state.params["a"] == 0.5
    assert state.params["b"] <= -3
    assert state.offender == "a"
    state, _ = step(state, 0.5)  # it goes on
    state, _ = step.many(state, np.array([np.nan, np.nan], np.float32))
    jax.block_until_ready(state)
    with pytest.raises(ol.NonFiniteError):
        step(state, 0.5)


def test_model_state_is_handed_on():
    def counting(own):
        def loss(p, x, *, model_state):
            return p[own] * model_state["n"], ol.Aux(model_state={"n": model_state["n"] + x})

        return ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD", variables=own)

    step = ol.together(a=counting("a"), b=counting("b"), every={"b": 2})
    with pytest.raises(ValueError, match="`model_state` must be given"):
        step.init({"a": 0.0, "b": 0.0})
    state = step.init({"a": 0.0, "b": 0.0}, model_state={"n": 0.0})
    state, _ = step.many(state, jnp.ones(2))
    assert state.model_state == {"n": 3.0}
    assert state.params == {"a": -1.0, "b": -2.0}


def test_each_loss_is_evaluated_with_its_weight_and_key():
    def built(own, **options):
        def loss(p, x, *, key):
            draw = jax.random.uniform(key)
            weight = x[0] if own == "b" else None
            return jnp.mean(p[own] * x), ol.Aux(metrics={"draw": draw}, weight=weight)

        return ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD", variables=own, **options)

    step = ol.together(a=built("a", ema=0.5), b=built("b"), every={"b": 3})
    state, _ = step.many(step.init({"a": 8.0, "b": 8.0}), jnp.ones((2, 1)))
    batches = [jnp.array([1.0, 1.0]), jnp.array([3.0])]
    found = step.evaluate(state, batches)
    average = float(state.eval_params["a"])
    assert 6 < average < 7
    draws = {n: [jax.random.uniform(key_of(n, i)) for i in range(2)] for n in "ab"}
    want = {
        "a/loss": average * (2 * 1 + 1 * 3) / 3,
        "a/draw": (2 * draws["a"][0] + draws["a"][1]) / 3,
        "b/loss": 8 * (1 * 1 + 3 * 3) / 4,
        "b/draw": (draws["b"][0] + 3 * draws["b"][1]) / 4,
    }
    assert found.keys() == want.keys()
    for tag, value in want.items():
        np.testing.assert_allclose(found[tag], value, rtol=1e-6)
    same(step.evaluate(state, batches, loss=lambda p, x: p["a"] - p["b"]), {"loss": average - 8})
    hook = ol.Evaluate(step, batches, every=1)
    step.run(state, [np.ones(1, np.float32)], hooks=[hook])
    assert {f"eval/{tag}" for tag in want} <= {*hook.latest}


class Scaled(nnx.Module):
    def __init__(self):
        self.scale, self.shift = nnx.Param(jnp.ones(2)), nnx.Param(jnp.zeros(2))
        self.calls = nnx.BatchStat(jnp.float32(0))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.scale[...] * x + self.shift[...]


def test_a_module_of_nnx_has_several_losses():
    def built(loss, own):
        return ol.optimize_loss(loss, learning_rate=0.25, optimizer="SGD", variables=own)

    fit = lambda model, x: jnp.sum((model(x) - 3) ** 2) / 2
    far = lambda model, x: -jnp.sum(model(x) * model.calls[...])  # the first call of a step is odd
    step = ol.together(fit=built(fit, "scale"), far=built(far, "shift"))
    state = step.init(Scaled())
    scale, shift, x = np.ones(2), np.zeros(2), np.array([1.0, 2.0], np.float32)
    for calls in (2, 4):
        state, _ = step(state, x)
        scale = scale - 0.25 * (scale * x + shift - 3) * x
        shift = shift + 0.25 * calls
    assert state.model.calls[...] == 4
    np.testing.assert_allclose(state.model.scale[...], scale, rtol=1e-6)
    np.testing.assert_allclose(state.model.shift[...], shift, rtol=1e-6)
    found = step.evaluate(state, [x])
    np.testing.assert_allclose(found["fit/loss"], np.sum((scale * x + shift - 3) ** 2) / 2)
    np.testing.assert_allclose(found["far/loss"], -5 * np.sum(scale * x + shift))
    assert state.model.calls[...] == 4  # an evaluation changes nothing


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_explain_says_what_is_then_made(precision):
    options = {"optimizer": "Adam", "learning_rate": 0.1, "precision": precision}
    step = ol.together(
        a=quadratic("a", **options), b=quadratic("b", **options, accumulate=2), every={"b": 2}
    )
    params = {"a": jnp.float32(1), "b": jnp.float32(2), "c": jnp.zeros(3)}
    found, state = step.explain(params), step.init(params)
    assert found.total_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    rows = {row.name: row for row in found.rows}
    assert rows["a"].moved_by == ("a.adam",)
    assert rows["b"].moved_by == ("b.adam",)
    assert not rows["c"].trained
    assert found.trained == 2
    assert next(name for name, _ in found.links if name.startswith("b.")) == "b.accumulate"
    assert state.decoded["a.adam"]["m"]["a"].dtype == jnp.float32


def test_a_sweep_and_a_range_test_take_several_losses():
    step = ol.together(a=quadratic("a"), b=quadratic("b"), every={"b": 2})
    state = step.init({"a": 1.0, "b": 1.0})
    found = step.sweep(state, jnp.zeros(2), **{"b.rate/learning_rate": [0.0, 1.0]})
    np.testing.assert_array_equal(found.states.params["b"], [1.0, 0.0])
    rates = step.find_learning_rate(
        state, [0.0], steps=20, highest=1e3, number="a.rate/learning_rate"
    )
    assert 0.01 < rates.suggestion <= 10.0


def spread_and_whole():
    """Return what slots spread over eight devices, and slots that are not, end with."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def joint(**options):
        def built(own):
            loss = lambda p, x: jnp.sum((p[own] - x) ** 2)
            return ol.optimize_loss(loss, learning_rate=0.1, variables=own, **options)

        return ol.together(a=built("a"), b=built("b"), every={"b": 2})

    start = {"a": jnp.ones((8, 2)), "b": jnp.ones((8, 2))}
    whole, _ = joint().many(joint().init(start), jnp.zeros(2))
    step = joint(shard_state="data")
    state = step.init(jax.device_put(start, NamedSharding(mesh, PartitionSpec())))
    state, _ = step.many(state, jnp.zeros(2))
    m = state.optimizer["b.adam"]["m"]["b"]
    alike = [bool((state.params[n] == whole.params[n]).all()) for n in start]
    shard = m.sharding.shard_shape(m.shape)
    return json.dumps([alike, shard, state.params["b"].sharding.is_fully_replicated])


def test_slots_of_each_are_spread_over_a_mesh():
    found = on_eight_devices("tests.step.test_together", "spread_and_whole")
    assert found == [[True, True], [1, 2], True]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda a: ol.together(), ol.InvalidType, "Give steps by name"),
        (lambda a: ol.together(a=3), ol.InvalidType, "`a` must be a TrainStep"),
        (lambda a: ol.together(**{"a.b": a}), ValueError, "has no '/' and no '.'"),
        (lambda a: ol.together(a=a, every=5), ol.InvalidType, "`every` must map"),
        (lambda a: ol.together(a=a, every={"b": 5}), ValueError, "must name steps of ['a']"),
        (lambda a: ol.together(a=a, every={"a": 0}), ValueError, "`every['a']` must be"),
        (
            lambda a: ol.together(a=a, b=quadratic("b", global_step=3)),
            ValueError,
            "`global_step` must be the same in all steps. Received: {'a': 0, 'b': 3}",
        ),
        (
            lambda a: ol.together(a=a, b=quadratic("b", precision="bfloat16")),
            ValueError,
            "`precision` must be the same",
        ),
        (
            lambda a: ol.together(a=a, b=quadratic("b", variables=None)).init({"a": 1.0, "b": 1.0}),
            ValueError,
            "`variables` of 'b' must name what it trains, as 'a' trains some of that, too: ['a']",
        ),
    ],
)
def test_mistakes_are_named(make, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make(quadratic("a"))


def test_a_state_of_other_steps_is_refused():
    step, other = ol.together(a=quadratic("a")), ol.together(b=quadratic("a"))
    with pytest.raises(ol.TreeMismatch, match="Links that differ"):
        step(other.init({"a": 1.0}), 1.0)
    with pytest.raises(ol.TreeMismatch, match="Links that differ"):
        step(quadratic("a").init({"a": 1.0}), 1.0)
