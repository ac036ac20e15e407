"""`state.reset`: slots of some parameters begin anew, and nothing else changes."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss._names import leaf_paths
from tests.cases import on_eight_devices, random_like, rows
from tests.engine.packed import assert_alike, linear, steps_of

T = ol.transforms
SHAPES = {"encoder": {"layer_0": {"bias": (2,), "kernel": (8, 2)}}, "scale": ()}
BIAS, KERNEL = "encoder/layer_0/bias", "encoder/layer_0/kernel"


def trained(step, params, batches):
    state = step.init(params)
    for batch in batches:
        state, _ = step(state, batch)
    return state


def assert_reset(chain, before, after, meant):
    """Slots of the parameters meant are those of `init`; all else is bit for bit what it was."""
    fresh = chain.init(before.params)
    assert_alike(after.params, before.params, 0)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    trees = (fresh, before.optimizer, after.optimizer)
    changed = 0
    for path, new, old, got in zip(
        leaf_paths(after.optimizer), *map(jax.tree.leaves, trees), strict=True
    ):
        is_slot = any(path.endswith(f"/{name}") for name in meant)
        np.testing.assert_array_equal(got, new if is_slot else old, err_msg=path)
        assert (got.dtype, got.shape, got.weak_type) == (old.dtype, old.shape, old.weak_type), path
        changed += bool(np.any(np.asarray(got) != np.asarray(old)))
    return changed


@pytest.mark.parametrize("case", rows())
def test_slots_of_every_link_begin_anew(case):
    """In arrays that parameters share where the chain allows it, else by themselves."""
    _, step = steps_of(case.chain)
    batches = [case.random_like(SHAPES, t) for t in (1, 2, 3)]
    before = trained(step, case.random_like(SHAPES, 0), batches)
    assert_reset(case.chain, before, before.reset("**/kernel"), [KERNEL])
    assert_reset(case.chain, before, before.reset("**"), leaf_paths(before.params))
    after, _ = step(before.reset("**"), batches[0])
    assert step._programs[False, True]._cache_size() == 1
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(after.params))


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_after_a_reset_momentum_is_that_of_a_new_run(bucket):
    """Momentum does not go by the step, so that its second life is its first."""
    step = ol.optimize_loss(
        linear, learning_rate=0.1, bucket=bucket, optimizer=lambda r: ol.optimizers.SGD(r, 0.9)
    )
    batches = [random_like(SHAPES, t) for t in range(1, 7)]
    first = trained(step, random_like(SHAPES, 0), batches[:3])
    again = trained(step, first.params, batches[3:])
    went_on = first.reset("encoder/**")
    for batch in batches[3:]:
        went_on, _ = step(went_on, batch)
    assert went_on.step == 6
    assert_alike(went_on.params["encoder"], again.params["encoder"], 0)
    assert bool(went_on.params["scale"] != again.params["scale"])


def test_moments_in_8_bits_begin_anew():
    step = ol.optimize_loss(
        lambda p: sum(jnp.sum(x) for x in p.values()), learning_rate=0.1, precision="float8"
    )
    tree = {"big": jnp.ones((80, 64)), "small": jnp.ones(3), "other": jnp.ones(2)}
    state = step.init(tree)
    for _ in range(3):
        state, _ = step(state)
    after = state.reset("big", "small")
    names = [f"m+v_{x}" for x in ("f8/big", "scale/big", "bf16/small")]
    fresh = step.chain.init(state.params)
    pairs = zip(*map(jax.tree.leaves, (fresh, state.optimizer, after.optimizer)), strict=True)
    for path, (new, old, got) in zip(leaf_paths(fresh), pairs, strict=True):
        wanted = new if any(path == f"adam/{name}" for name in names) else old
        np.testing.assert_array_equal(got, wanted, err_msg=path)
    assert not np.any(after.decoded["adam"]["m"]["big"])
    assert np.all(after.decoded["adam"]["m"]["other"])


def test_averages_begin_anew_at_the_parameter():
    chain = T.chain(rate=T.ScaleByLearningRate(0.5), ema=T.AverageParams(0.5))
    step = steps_of(chain, loss=lambda p: p["a"] + p["b"])[1]
    state, _ = step(step.init({"a": 2.0, "b": 2.0}))
    state = state.reset("a")
    averages = chain.averaged(state.optimizer, state.params)
    assert (averages["a"], averages["b"]) == (1.5, 1.75)


def test_adams_first_update_after_a_reset_is_the_documented_one():
    """Late in training nothing corrects the start: (1-β₁) / √(1-β₂) times the rate."""
    loss = lambda p: p["w"]
    step = ol.optimize_loss(loss, learning_rate=1.0, optimizer="Adam")
    state, _ = step(step.init({"w": 0.0}))
    optimizer = {**state.optimizer, "step": jnp.int32(100_000)}
    state = state.with_trees(optimizer=optimizer).reset("w")
    before = float(state.params["w"])
    state, _ = step(state)
    assert before - float(state.params["w"]) == pytest.approx(0.1 / 0.001**0.5, rel=1e-4)


def test_numbers_that_were_set_and_numbers_named_as_a_parameter_stay():
    options: dict[str, Any] = {"optimizer": "Adam", "gradient_multipliers": {"scale": 2.0}}
    step = ol.optimize_loss(linear, learning_rate=0.1, clip_gradients=1.0, **options)
    state = trained(step, random_like(SHAPES, 0), [random_like(SHAPES, 1)])
    state = state.set(learning_rate=0.5, **{"gradient_multipliers/scale": 3.0}).reset("scale")
    assert state.optimizer["gradient_multipliers"]["multipliers/scale"] == 3.0
    assert state.optimizer["rate"]["learning_rate"] == 0.5
    assert state.optimizer["adam"]["m"]["scale"] == 0
    assert state.step == 1


@pytest.mark.parametrize("name", ["adam", "chain"])
def test_the_state_of_an_optax_transformation_begins_anew_by_name(name):
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
        adam = optax.adam(0.1)
        tx = adam if name == "adam" else optax.chain(optax.clip(1.0), adam)
        step = ol.optimize_loss(linear, optimizer=tx)
        state = trained(step, random_like(SHAPES, 0), [random_like(SHAPES, t) for t in (1, 2)])
        new = state.reset("**/bias")
        changed = assert_reset(step.chain, state, new, [BIAS])
        assert changed == 2  # mu and nu; the count stays
        step(new, random_like(SHAPES, 3))
        assert step._programs[False, True]._cache_size() == 1


def test_names_that_optax_has_too_are_told_apart():
    """A parameter called as Adam's count of updates, and one in a dict called as its mean."""
    with jax.numpy_dtype_promotion("standard"):
        masks = {"count": False, "mu": {"w": True}, "w": False}
        tx = optax.chain(optax.masked(optax.trace(0.9), masks), optax.adam(0.1))
        step = ol.optimize_loss(linear, optimizer=tx)
        shapes = {"count": (), "mu": {"w": (2,)}, "w": (2,)}
        state = trained(step, random_like(shapes, 0), [random_like(shapes, 1)])
        for name, slots in (("count", 2), ("w", 2), ("mu/w", 3)):
            new = state.reset(name)
            changed = jax.tree.map(
                lambda a, b: bool((a != b).any()), new.optimizer, state.optimizer
            )
            assert sum(jax.tree.leaves(changed)) == slots, name
            trace, adam = (
                new.optimizer["optimizer"][0].inner_state,
                new.optimizer["optimizer"][1][0],
            )
            assert adam.count == 1
            parts = name.split("/")
            for tree in (adam.mu, adam.nu, *([trace.trace] if name == "mu/w" else [])):
                for part in parts:
                    tree = tree[part]
                assert not np.any(tree)


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_slots_of_rules_with_optimizers_of_their_own_begin_anew(bucket):
    rules: Any = {
        "scale": {"optimizer": "Lion", "weight_decay": 0.1},
        "**/bias": {"optimizer": optax.sgd(0.1, momentum=0.9)},
    }
    step = ol.optimize_loss(linear, learning_rate=0.1, optimizer="Adam", rules=rules, bucket=bucket)
    batches = [random_like(SHAPES, t) for t in (1, 2)]
    state = trained(step, random_like(SHAPES, 0), batches)
    for pattern, meant, slots in (("scale", "scale", 1), ("**/bias", BIAS, 1), (KERNEL, KERNEL, 2)):
        assert assert_reset(step.chain, state, state.reset(pattern), [meant]) == slots
    step(state.reset("**"), batches[0])
    assert step._programs[False, True]._cache_size() == 1


def test_variables_of_an_optimizer_written_as_for_keras_begin_anew():
    class Momentum(ol.optimizers.Optimizer):
        def __init__(self, learning_rate=0.1, name="Momentum", **kwargs):
            super().__init__(name=name, **kwargs)
            self._learning_rate = self._build_learning_rate(learning_rate)

        def build(self, var_list):
            super().build(var_list)
            self.sums = [self.add_variable_from_reference(v, "m") for v in var_list]

        def update_step(self, gradient, variable):
            m = self.sums[self._get_variable_index(variable)]
            m.assign(0.5 * m.value + gradient)
            variable.assign_sub(self.learning_rate * m.value)

        def get_config(self):
            return {**super().get_config(), "learning_rate": self._learning_rate}

    step = ol.optimize_loss(linear, optimizer=Momentum())
    params, grads = {"a": 1.0, "b": 1.0}, {"a": jnp.ones(()), "b": jnp.ones(())}
    state, _ = step(step.init(params), grads)
    state, _ = step(state.reset("a"), grads)
    np.testing.assert_allclose(state.params["a"], 1 - 0.1 - 0.1, rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], 1 - 0.1 - 0.15, rtol=1e-6)


def test_under_jit_and_vmap():
    step = ol.optimize_loss(linear, learning_rate=0.1, optimizer="Adam")
    state = trained(step, random_like(SHAPES, 0), [random_like(SHAPES, 1)])
    one = state.reset("scale")
    assert_alike(jax.jit(lambda s: s.reset("scale"))(state).optimizer, one.optimizer, 0)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    swept = jax.vmap(lambda s: s.reset("scale"))(many)
    assert_alike(jax.tree.map(lambda x: x[1], swept.optimizer), one.optimizer, 0)


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], tuple[str, ...]]] = {
    "none": ((), ol.InvalidType, ("`patterns`", "reset('**')")),
    "kind": ((3,), ol.InvalidType, ("`reset`", "3")),
    "27-nothing": (("heda/*",), ValueError, ("'heda/*'", "'head/w'")),
    "one-of-two": (("head/*", "bdoy"), ValueError, ("'bdoy'", "'body'")),
    "not-trained": (("body",), ValueError, ("must name a parameter that has slots", "'head/w'")),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_raises(name):
    patterns, error, says = BAD[name]
    step = ol.optimize_loss(linear, learning_rate=0.1, variables=["head/*"])
    state = step.init({"head": {"w": 1.0}, "body": 1.0})
    with pytest.raises(error) as caught:
        state.reset(*patterns)
    assert type(caught.value) is error
    for text in says:
        assert text in str(caught.value)


def test_where_nothing_has_slots_there_is_nothing_to_reset():
    step = ol.optimize_loss(linear, learning_rate=0.1, optimizer="SGD")
    state = step.init({"w": 1.0})
    assert_alike(state.reset("w").optimizer, state.optimizer, 0)


def sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    places = {"big": split, "bias": whole, "scale": whole}
    shapes = {"big": (16, 2), "bias": (3,), "scale": ()}
    trees = [random_like(shapes, t) for t in range(3)]
    trees = [jax.tree.map(jax.device_put, tree, places) for tree in trees]
    results = {}
    for bucket in (None, "auto"):
        step = ol.optimize_loss(linear, learning_rate=0.1, optimizer="Adam", bucket=bucket)
        before = trained(step, trees[0], trees[1:])
        after = before.reset("b*")
        kept = jax.tree.map(lambda a, b: a.sharding == b.sharding, after, before)
        slots = jax.tree.map(lambda x: float(jnp.abs(x).sum()), after.optimizer["adam"])
        step(after, trees[1])
        results[str(bucket)] = {
            "kept": all(jax.tree.leaves(kept)),
            "m": slots["m"],
            "compiled": step._programs[False, True]._cache_size(),
        }
    return json.dumps(results)


@pytest.mark.slow
def test_slots_stay_where_they_are():
    for result in on_eight_devices(__name__, "sharded").values():
        assert result["kept"]
        assert result["compiled"] == 1
        assert result["m"]["big"] == result["m"]["bias"] == 0 < result["m"]["scale"]
