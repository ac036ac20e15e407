"""The first state and the first look at it: few compilations, and nobody else's arrays."""

import dataclasses
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import optimize_loss as ol
from optimize_loss._engine.bucket import Bucket
from tests.cases import on_eight_devices

T = ol.transforms
BUCKETS = pytest.mark.parametrize("bucket", [None, 4])
KEY, RATE = jax.random.key(1), np.float32(0.1)


def squares(params):
    return sum(jnp.sum(p * p) for p in jax.tree.leaves(params))


def params():
    """Three that share an array where there is a bucket, and one that does not."""
    return {"a": jnp.ones(3), "b": jnp.zeros(2), "c": jnp.array(4.0), "large": jnp.ones((3, 3))}


@dataclasses.dataclass(frozen=True)
class Kept(T.Link):
    """A link that returns the same array as a slot each time."""

    def slots(self, param):
        return {"kept": _KEPT.setdefault(param.shape, jnp.ones_like(param))}


_KEPT: dict = {}


@pytest.fixture
def compiled():
    """The programs that XLA compiles while the test runs: one entry each."""
    found = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.clear_caches()
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("as_numpy", [True, False])
def test_a_first_state_compiles_a_handful(compiled, as_numpy):
    """One for the numbers of the chain; one for the parts of it, and one for the step."""
    tree = {f"p{i}": np.ones((i, 2), np.float32) for i in range(1, 9)}
    tree = tree if as_numpy else jax.device_put(tree)
    step = ol.optimize_loss(squares, learning_rate=0.1, optimizer="Adam", bucket=10)
    compiled.clear()
    state = step.init(tree)
    assert len(compiled) <= 1
    jax.block_until_ready((state.params, state.optimizer, state.step))
    assert len(compiled) <= 3
    state = state.set(learning_rate=0.2).with_trees(params=state.params).reset("p1")
    assert len(compiled) <= 3
    state, _ = step(state)
    jax.block_until_ready((state.params, state.optimizer, state.step))
    assert len(compiled) <= 4


def test_a_large_tree_compiles_no_large_program(compiled):
    """Programs of a result or an operand for each leaf compile in time that grows with both."""
    tree = {f"p{i}": np.full(i % 3 + 1, i, np.float32) for i in range(300)}
    step = ol.optimize_loss(squares, learning_rate=0.1, optimizer="Adam")
    state = step.init(tree)
    compiled.clear()
    got = state.with_trees(params=state.params).reset("p1").params
    jax.tree.map(np.testing.assert_array_equal, got, tree)
    assert len(compiled) <= 2  # the numbers of the chain, taken apart and put together


def test_a_look_at_the_params_leaves_their_memory_to_the_step():
    step = ol.optimize_loss(squares, learning_rate=0.1)
    old = step.init({"a": jnp.ones(3), "b": jnp.ones(2)})
    seen = old.params
    step(old)
    assert all(x.is_deleted() for x in jax.tree.leaves(old.packed_params))
    np.testing.assert_array_equal(seen["a"], np.ones(3))


def with_key():
    """As `optax.add_noise`, which keeps the key that it was given, but for the noise."""
    functions: Any = lambda _: {"key": KEY}, lambda u, s, _=None: (u, s)
    return optax.GradientTransformation(*functions)


TAKE_ARRAYS = {
    "key": lambda: optax.chain(with_key(), optax.sgd(0.1)),
    "rate": lambda: optax.inject_hyperparams(optax.sgd)(jnp.asarray(RATE)),
    "link": lambda: T.chain(key=with_key(), rate=T.ScaleByLearningRate(0.1)),
    "slot": lambda: T.chain(kept=Kept(), rate=T.ScaleByLearningRate(0.1)),
}


@BUCKETS
@pytest.mark.parametrize("name", TAKE_ARRAYS)
def test_arrays_that_an_optimizer_was_given_stay(name, bucket, tmp_path):
    step = ol.optimize_loss(squares, optimizer=TAKE_ARRAYS[name](), bucket=bucket)
    state, _ = step(step.init(params()).reset("**"))
    ol.save(tmp_path / "a.safetensors", state)
    again, _ = ol.restore(tmp_path / "a.safetensors", step.init(params()))
    step(again)
    step(step.init(params()).reset("**"))
    assert not any(x.is_deleted() for x in (KEY, *_KEPT.values()))


def swapped(state):
    """The slots of one kind in the place of the other."""
    adam = state.optimizer["adam"]
    return state.with_trees(optimizer={**state.optimizer, "adam": {**adam, "v": adam["m"]}})


def in_two_places(state):
    array = jnp.full((3, 3), 2.0)
    adam = state.optimizer["adam"]
    slots = {**adam, "m": {**adam["m"], "large": array}, "v": {**adam["v"], "large": array}}
    return state.with_trees({**state.params, "large": array}, {**state.optimizer, "adam": slots})


TREES = {
    "average": lambda state: state.with_trees(params=state.eval_params),
    "own": lambda state: state.with_trees(params=state.params, optimizer=state.optimizer),
    "slots": swapped,
    "two-places": in_two_places,
}


@BUCKETS
@pytest.mark.parametrize("change", TREES.values(), ids=TREES)
def test_a_state_with_other_trees_can_be_stepped(change, bucket):
    step = ol.optimize_loss(squares, learning_rate=0.1, ema=0.9, bucket=bucket)
    state = step.init(params())
    new, _ = step(change(state))
    assert np.isfinite(squares(new.params))


@BUCKETS
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_trees_that_were_given_to_a_state_stay(kind, bucket):
    step = ol.optimize_loss(squares, learning_rate=0.1, bucket=bucket)
    given = jax.tree.map(lambda x: kind(x + 1), params())
    states = [step.init(params()).with_trees(params=given) for _ in range(2)]
    ends = [step(state)[0].params for state in states]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    np.testing.assert_array_equal(given["large"], np.full((3, 3), 2))


@BUCKETS
def test_trees_that_are_nowhere_go_where_the_state_is(bucket):
    """So that the next step is the program that there is."""
    device = jax.devices()[0]
    step = ol.optimize_loss(squares, learning_rate=0.1, bucket=bucket)
    state = step.init(jax.device_put(params(), device))
    new = state.with_trees(jax.tree.map(np.asarray, state.params), state.optimizer)
    assert all(x.committed for x in jax.tree.leaves(new))


@BUCKETS
def test_what_is_shown_is_committed_where_the_state_is(bucket):
    step = ol.optimize_loss(squares, learning_rate=0.1, bucket=bucket)
    for tree in (params(), jax.device_put(params(), jax.devices()[0])):
        state = step.init(tree)
        for shown in (state.params, state.optimizer):
            for leaf in jax.tree.leaves(shown):
                assert leaf.committed == tree["a"].committed


@BUCKETS
def test_a_step_that_colocates_gradients_does_not_wait_for_the_one_before(bucket, monkeypatch):
    step = ol.optimize_loss(
        squares, learning_rate=0.1, colocate_gradients_with_ops=True, bucket=bucket
    )
    state = step.init(params())
    monkeypatch.setattr("optimize_loss._engine.members.fetched", None)
    state, _ = step(*step(state)[:1])
    assert state.outline["large"].sharding == state.packed_params["large"].sharding


def on_a_mesh():
    """Whether states change place, and how many programs steps with them are."""
    shapes = [(2, 8), (16,), (4, 4), (8,), (3, 8), (1, 16), (3,), (50, 100)]
    found = []
    for kind, axis in itertools.product((AxisType.Auto, AxisType.Explicit), ("d", None)):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
        tree = {f"p{i}": np.full(s, i, np.float32) for i, s in enumerate(shapes)}
        tree = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
        step = ol.optimize_loss(squares, learning_rate=0.1, shard_state=axis)
        state, _ = step(step.init(tree))
        before = _shardings(state)
        for change in (
            lambda s: s.with_trees(s.params, s.optimizer),
            lambda s: s.with_trees(*jax.tree.map(np.asarray, (s.params, s.optimizer))),
            lambda s: s.reset("**"),
        ):
            changed = change(state)
            found.append(_shardings(changed) == before)
            state, _ = step(changed)
        split = [x.split_on_device(b) for b, x in _buckets(state.packed_params)]
        shown = [[state.params[n] for n in x.names] for _, x in _buckets(state.packed_params)]
        found.append(_shardings(split) == _shardings(shown))
        slots = state.packed_optimizer["adam"]["m"], state.optimizer["adam"]["m"]
        split = [x.split_on_device(b) for b, x in _buckets(slots[0])]
        shown = [[slots[1][n] for n in x.names] for _, x in _buckets(slots[0])]
        found.append(_shardings(split) == _shardings(shown))
        found.append(step._programs[False, True]._cache_size() == 1)
    return json.dumps(found)


def _buckets(packed):
    return [(x.buffer, x.members) for x in packed.values() if isinstance(x, Bucket)]


def _shardings(tree):
    return [(x.sharding, x.committed) for x in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_a_state_on_many_devices_stays_where_it_is():
    """And parts of its arrays are shown where a program that cuts them out would put them."""
    assert on_eight_devices(__name__, "on_a_mesh") == [True] * 24


HOST = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def test_parameters_to_train_must_be_on_the_device():
    step = ol.optimize_loss(squares, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"'large' must be in the memory of its device") as caught:
        step.init({**params(), "large": jax.device_put(jnp.ones((3, 3)), HOST)})
    assert "float32<host>[3,3]" in str(caught.value)
    with pytest.raises(ValueError, match="`state` must be in the memory of its device"):
        step(jax.device_put(step.init(params()), HOST))


def test_a_parameter_that_is_not_trained_can_be_on_the_host():
    step = ol.optimize_loss(lambda p: jnp.sum(p["w"]), learning_rate=0.1, variables="w")
    state = step.init({"w": jnp.ones(2), "table": jax.device_put(jnp.ones(3), HOST)})
    state, _ = step(step(state)[0])
    kinds = {name: x.sharding.memory_kind for name, x in state.params.items()}
    assert kinds == {"w": "device", "table": "pinned_host"}


@BUCKETS
def test_a_state_on_the_host_can_be_looked_at_and_changed(bucket, tmp_path):
    step = ol.optimize_loss(squares, learning_rate=0.1, ema=0.9, bucket=bucket)
    start, _ = step(step.init(params()))
    want = jax.tree.map(np.asarray, start.set(learning_rate=0.2).reset("a"))
    state = jax.device_put(start, HOST)
    ol.save(tmp_path / "a.safetensors", state)
    state, _ = ol.restore(tmp_path / "a.safetensors", state)
    state = state.with_trees(state.params, state.optimizer).set(learning_rate=0.2).reset("a")
    shown = jax.tree.leaves((state.params, state.optimizer, state.eval_params))
    assert {x.sharding.memory_kind for x in (*shown, *jax.tree.leaves(state))} == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, state, want)
    assert int(step(jax.device_put(state, jax.memory.Space.Device))[0].step) == 2
