"""States in the files of other tools: orbax, flax, and all that save trees of arrays by path."""

import dataclasses
import subprocess
import sys
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optimize_loss as ol
from tests.cases import CASES

LARGE = 5000  # more entries than one in a bucket has


def loss(params):
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


def with_rest(params, *, model_state, key):
    noise = jax.random.uniform(key)
    return loss(params) * noise, ol.Aux(model_state=jax.tree.map(lambda x: x + 1, model_state))


def built(names, **options):
    """Return a step, and its first state: parameters named so that are 0, 1, … everywhere."""
    step = ol.optimize_loss(loss, learning_rate=0.1, **options)
    return step, step.init({name: jnp.full(2, float(i)) for i, name in enumerate(names)})


def assert_equal(got, wanted):
    """Compare leaves by name, bit for bit."""
    got, wanted = ol.to_state_dict(got), ol.to_state_dict(wanted)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (got, wanted)]
    assert dtypes[0] == dtypes[1]


def paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


# The pytree itself.

OTHER_NAMES = {
    "renumbered": (["layer_9", "layer_10"], ["layer_09", "layer_10"]),
    "renamed": (["a", "b"], ["a", "c"]),
}


@pytest.mark.parametrize("options", [{}, {"bucket": None}], ids=["bucket", "no-bucket"])
@pytest.mark.parametrize("names", OTHER_NAMES)
def test_paths_are_others_for_other_names(names, options):
    (_, one), (_, other) = (built(names, **options) for names in OTHER_NAMES[names])
    _, again = built(OTHER_NAMES[names][0], **options)
    assert paths(one) == paths(again)
    assert set(paths(one.packed_params)).isdisjoint(paths(other.packed_params)) or options
    assert paths(one) != paths(other)


def test_paths_are_others_for_other_shapes_and_numbers():
    def of(shape, **options):
        step = ol.optimize_loss(loss, learning_rate=0.1, **options)
        return paths(step.init({"a": jnp.zeros(shape), "b": jnp.zeros(3)}))

    assert of((2, 3)) != of((3, 2))
    assert of(2, optimizer="SGD") != of(2, optimizer="Momentum")


def test_orbax_refuses_the_parameters_of_others(tmp_path):
    (_, one), (_, other) = (built(names) for names in OTHER_NAMES["renumbered"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", one)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="do not match"):
            checkpointer.restore(tmp_path / "state", other)
        assert_equal(checkpointer.restore(tmp_path / "state", one), one)


# Dicts by name.


def rich(impl="threefry2x32", **options):
    """Return a step and a state with all that a state can have."""
    step = ol.optimize_loss(
        with_rest, learning_rate=0.1, ema=0.9, clip_gradients=1.0, skip="nonfinite", **options
    )
    params = {"a/b": jnp.ones(3), "c": {"d": [jnp.ones((2, 2)), jnp.ones(LARGE)]}, "n": None}
    model_state = {"count": jnp.int32(0), "mean": jnp.zeros(2)}
    return step, step.init(params, model_state=model_state, key=jax.random.key(7, impl=impl))


def tools(tmp_path):
    def orbax(state, like):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", ol.to_state_dict(state))
            checkpointer.wait_until_finished()
            shapes = jax.eval_shape(ol.to_state_dict, like)
            return ol.from_state_dict(like, checkpointer.restore(tmp_path / "state", shapes))

    def orbax_alone(state, like):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", ol.to_state_dict(state))
            checkpointer.wait_until_finished()
            return ol.from_state_dict(like, checkpointer.restore(tmp_path / "state"))

    def flax_bytes(state, like):
        return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))

    def flax_inside(state, like):
        data = flax.serialization.to_bytes({"state": state, "epoch": 3})
        back = flax.serialization.from_bytes({"state": like, "epoch": 0}, data)
        assert back["epoch"] == 3
        return back["state"]

    def none(state, like):
        return ol.from_state_dict(like, ol.to_state_dict(state))

    return (none, orbax, orbax_alone, flax_bytes, flax_inside)


@pytest.mark.parametrize("options", [{}, {"bucket": None}], ids=["bucket", "no-bucket"])
@pytest.mark.parametrize("tool", range(5))
def test_a_state_comes_back_and_goes_on(tool, options, tmp_path):
    step, like = rich(**options)
    state, _ = step(rich(**options)[1])
    back = tools(tmp_path)[tool](state, like)
    assert_equal(back, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_equal(step(back)[0], step(state)[0])
    assert int(like.step) == 0  # not given away


def test_an_asynchronous_save_has_the_state_as_it_was(tmp_path):
    """The next step takes its memory while the file is still written."""
    step, state = rich()
    wanted = jax.device_get(ol.to_state_dict(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", ol.to_state_dict(state))
        for _ in range(3):
            state, _ = step(state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state")
    jax.tree.map(np.testing.assert_array_equal, back, wanted)


def test_the_dict_can_be_read():
    tree = ol.to_state_dict(rich()[1])
    assert sorted(tree) == ["batches", "first_step", "key", "model_state", "optimizer", "params"]
    assert tree["params"]["a/b"].shape == (3,)
    assert tree["params"]["c"]["d"]["1"].shape == (LARGE,)
    assert tree["optimizer"]["adam"]["m"]["c"]["d"]["0"].shape == (2, 2)
    assert tree["optimizer"]["rate"]["learning_rate"] == jnp.float32(0.1)
    assert list(tree["key"]) == ["threefry2x32"]
    flax.serialization.msgpack_serialize(tree)


def test_of_shapes_it_has_shapes():
    _, state = rich()
    shapes = jax.eval_shape(lambda: state)
    assert jax.tree.leaves(ol.to_state_dict(shapes)) == jax.tree.leaves(
        jax.eval_shape(ol.to_state_dict, state)
    )


def test_parameters_of_a_framework():
    """Here those of flax nnx, in boxes whose attribute does not show."""
    _, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    step = ol.optimize_loss(loss, learning_rate=0.1)
    state, _ = step(step.init(params))
    assert sorted(ol.to_state_dict(state)["params"]) == ["bias", "kernel"]
    assert_equal(ol.from_state_dict(step.init(params), ol.to_state_dict(state)), state)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_link_comes_back(case):
    step = dataclasses.replace(ol.optimize_loss(loss, learning_rate=0.1), chain=case.chain)
    state = step.init(case.params())
    tree = jax.tree.map(lambda x: np.asarray(x) + np.ones((), x.dtype), ol.to_state_dict(state))
    back = ol.to_state_dict(ol.from_state_dict(state, tree))
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def changed(tree, **parts):
    return {**tree, **parts}


STEP, LIKE = rich()
TREE: dict[str, Any] = ol.to_state_dict(LIKE)
MISMATCHES = {
    "missing": (
        changed(TREE, model_state={"mean": jnp.zeros(2)}),
        "Only in `like`: ['model_state/count']",
    ),
    "extra": (changed(TREE, params=changed(TREE["params"], x=1.0)), "Only in `tree`: ['params/x']"),
    "shape": (changed(TREE, first_step=np.zeros(1, np.int32)), "at 'first_step' shape ()"),
    "dtype": (changed(TREE, first_step=np.float32(0)), "dtype int32"),
    "kind-of-key": (
        changed(TREE, key={"rbg": np.zeros(4, np.uint32)}),
        "Only in `like`: ['key/threefry2x32']. Only in `tree`: ['key/rbg']",
    ),
    "data-of-key": (changed(TREE, key={"threefry2x32": np.zeros(4, np.uint32)}), "shape (2,)"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_dict_of_another_state_is_refused(name):
    tree, words = MISMATCHES[name]
    with pytest.raises(ol.CheckpointMismatch) as caught:
        ol.from_state_dict(LIKE, tree)
    assert words in str(caught.value)
    assert "Make `like` with" in str(caught.value)


def test_wrong_kinds_are_refused():
    wrong: Any = {"params": {}}
    with pytest.raises(ol.InvalidType, match="`state` must be a TrainState"):
        ol.to_state_dict(wrong)
    with pytest.raises(ol.InvalidType, match="`like` must be a TrainState"):
        ol.from_state_dict(wrong, TREE)
    with pytest.raises(ol.InvalidType, match="`tree` must be a dict"):
        ol.from_state_dict(LIKE, wrong["params"].values())


def test_flax_is_told_when_it_comes_later():
    code = """
import jax.numpy as jnp, optimize_loss as ol
step = ol.optimize_loss(lambda p: jnp.sum(p["w"]), learning_rate=0.1)
from flax import serialization
state = step.init({"w": jnp.ones(3)})
print(serialization.from_bytes(state, serialization.to_bytes(state)).params["w"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1. 1. 1.]"
