"""The first state and the first look at it: few compilations, and nobody else's arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimize_loss as ol

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

    def listen(event, seconds, **_):
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
    return optax.GradientTransformation(lambda _: {"key": KEY}, lambda u, s, _=None: (u, s))


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
    assert not KEY.is_deleted() and not any(x.is_deleted() for x in _KEPT.values())


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
