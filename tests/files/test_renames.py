"""Names in a file become other names, and shapes and dtypes stay what they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss._files.named import on_host
from tests.files.saved import (
    PLAIN,
    W,
    assert_equal,
    assert_matched,
    built,
    links,
    ol,
    params,
    quadratic,
    renamed_loss,
    saved,
)


def test_a_model_state_and_its_names(path):
    def keeps(params, x, *, model_state):
        new = {"layer": {"mean": model_state["layer"]["mean"] + jnp.mean(x)}}
        return jnp.sum(params["w"] ** 2), ol.Aux(model_state=new)

    step = built("SGD", keeps)
    state = step.init({"w": jnp.ones(2)}, model_state={"layer": {"mean": jnp.zeros(())}})
    state, _ = step(state, jnp.ones(3))
    ol.save(path, state)
    like = step.init({"w": jnp.zeros(2)}, model_state={"layer": {"mean": jnp.zeros(())}})
    again, _ = ol.restore(path, like, strict=True)
    assert again.model_state == {"layer": {"mean": 1.0}}

    def other(params, x, *, model_state):
        return jnp.sum(params["w"] ** 2), ol.Aux(model_state=model_state)

    moved = built("SGD", other)
    like = moved.init({"w": jnp.zeros(2)}, model_state={"block": {"mean": jnp.zeros(())}})
    again, report = ol.restore(path, like, rename={"layer": "block"}, strict=True)
    assert again.model_state == {"block": {"mean": 1.0}}
    assert "model_state/block/mean" in report.matched


def test_slots_of_optax_follow_a_parameter_of_another_name(path):
    step = built(optax.adam(0.01))
    ol.save(path, state := step.init(params()))
    wanted = on_host(state)
    after = built(optax.adam(0.01), renamed_loss)
    p = params(1)
    like = after.init({"body": {"first": p["dense"]}, "head": p["head"]})
    state, report = ol.restore(path, like, rename={"dense": "body/first"}, strict=True)
    assert len(report.matched) == len(wanted)
    assert_matched(state, report, {n.replace("dense", "body/first"): x for n, x in wanted.items()})


def test_a_number_that_ends_like_a_parameter_is_not_renamed(path):
    def both(p, x):
        return jnp.sum(p.get("bias", p.get("b")) * x) + jnp.sum(p["enc"]["bias"])

    rules = {"enc/bias": {"weight_decay": 0.1, "learning_rate_multiplier": 2.0}}
    step = built("AdamW", both, rules=rules, gradient_multipliers={"enc/bias": 3.0})
    tree = {"bias": jnp.ones(2), "enc": {"bias": jnp.ones(2)}}
    changed = {"weight_decay/enc/bias": 0.7, "gradient_multipliers/enc/bias": 9.0}
    state = step.init(tree).set(**changed)
    ol.save(path, state)
    like = step.init({"b": jnp.ones(2), "enc": {"bias": jnp.ones(2)}}).set(**changed)
    again, report = ol.restore(path, like, rename={"bias": "b"}, strict=True)
    assert len(report.matched) == len(on_host(state))
    assert float(again.optimizer["weight_decay"]["weight_decay/enc/bias"]) == np.float32(0.7)


@pytest.mark.parametrize("of_rule", [False, True])
def test_what_counts_is_not_renamed_as_a_parameter(path, of_rule):
    def built_for(name):
        options = {"optimizer": optax.adam(0.01)}
        if of_rule:
            options = {"optimizer": "SGD", "rules": {f"{name}|mu": options}}
        return built(function=lambda p, x: jnp.sum(p[name] * p["mu"] * x), **options)

    step = built_for("count")
    with jax.numpy_dtype_promotion("standard"):
        state, _ = step(step.init({"count": jnp.ones(2), "mu": jnp.ones(2)}), 1.0)
        ol.save(path, state)
        wanted = on_host(state)
        like = built_for("n").init({"n": jnp.zeros(2), "mu": jnp.zeros(2)})
        again, report = ol.restore(path, like, rename={"count": "n"}, strict=True)
    got = on_host(again)
    assert len(report.matched) == len(wanted)
    slots = [n for n in wanted if n.endswith("/count") and wanted[n].shape == (2,)]
    assert len(slots) == 3  # the parameter, and two moments
    for name, array in wanted.items():
        other = name.removesuffix("count") + "n" if name in slots else name
        np.testing.assert_array_equal(got[other], array)


RENAMES = {
    "old": ({"dens": "body"}, "must name what is in the file.*'dens'.*'dense/bias'"),
    "no-part": ({"dense/ker": "body"}, "must name what is in the file.*'dense/ker'"),
    "earlier-takes-all": ({"dense": "head", "dense/bias": "b"}, "must name what is in the file"),
    "new": ({"dense": "dance"}, "must give names that `like` has.*'dance/bias'"),
    "two-to-one": ({"dense/kernel": "head/kernel"}, "must give different names"),
    "function-of-nothing": (lambda name: name, "must change a name"),
    "function-to-none": (lambda name: None, "must return a text"),
    "text": ("dense", "must be {name: new name}"),
    "to-number": ({"dense": 1}, "must map texts to texts"),
}


@pytest.mark.parametrize("name", RENAMES)
def test_a_rename_must_fit(path, name):
    rename, message = RENAMES[name]
    saved(PLAIN, path)
    with pytest.raises(ValueError, match=message):
        ol.restore(path, PLAIN.init(params()), rename=rename)


def test_a_rename_by_a_function(path):
    wanted = saved(PLAIN, path)
    after = built(links(), renamed_loss)
    p = params(1)
    like = after.init({"body": {"first": p["dense"]}, "head": p["head"]})
    state, report = ol.restore(
        path, like, rename=lambda name: name.replace("dense", "body/first"), strict=True
    )
    assert_matched(state, report, {n.replace("dense", "body/first"): x for n, x in wanted.items()})


def test_parameters_can_change_names(path):
    square = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    step = built("SGD", lambda p, x: jnp.sum(p["a"] * p["b"] * x))
    ol.save(path, step.init(square))
    state, _ = ol.restore(path, step.init(square), rename={"a": "b", "b": "a"}, strict=True)
    np.testing.assert_array_equal(state.params["a"], np.zeros(2))
    np.testing.assert_array_equal(state.params["b"], np.ones(2))


def mismatch(theirs, ours):
    return built("SGD", quadratic).init(theirs), built("SGD", quadratic).init(ours)


WRONG = {
    "shape": (*mismatch(W, {"w": jnp.ones((3, 2))}), "params/w' is float32[2, 3] in the file"),
    "rank": (*mismatch(W, {"w": jnp.ones(6)}), "and float32[6] in `like`"),
    "dtype": (*mismatch(W, {"w": jnp.ones((2, 3), jnp.bfloat16)}), "and bfloat16[2, 3] in `like`"),
    "complex": (*mismatch(W, {"w": jnp.ones((2, 3), jnp.complex64)}), "and complex64[2, 3]"),
    "pairs": (
        *mismatch({"w": jnp.ones(2, jnp.complex64)}, {"w": jnp.ones((2, 2))}),
        "complex64[2]",
    ),
    "key": (
        PLAIN.init(params()),
        PLAIN.init(params(), key=jax.random.key(0, impl="rbg")),
        "'key' is threefry2x32[] in the file and rbg[] in `like`",
    ),
    "raw-key": (
        PLAIN.init(params(), key=jax.random.PRNGKey(0)),
        PLAIN.init(params()),
        "'key' is uint32[2] in the file and threefry2x32[] in `like`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_shapes_and_dtypes_never_change(path, name):
    state, like, message = WRONG[name]
    ol.save(path, state)
    with pytest.raises(ol.CheckpointMismatch, match=re.escape(message)) as error:
        ol.restore(path, like)
    assert str(path) in str(error.value)


def test_float64_is_not_restored_into_float32(path):
    with jax.enable_x64(True):
        step = built("SGD", quadratic)
        wide = step.init({"w": jnp.ones(2)})
        assert wide.params["w"].dtype == jnp.float64
        ol.save(path, wide)
        again, _ = ol.restore(path, wide, strict=True)
        assert_equal(again, wide)
    with pytest.raises(ol.CheckpointMismatch, match=r"params/w' is float64\[2\] in the file"):
        ol.restore(path, built("SGD", quadratic).init({"w": jnp.ones(2)}))
    with pytest.raises(ol.CheckpointMismatch, match="`like` must be of this mode of JAX"):
        ol.restore(path, wide)


def test_a_file_of_another_model(path):
    step = built("SGD", quadratic)
    ol.save(path, step.init({"kernel": jnp.ones(2), "bias": jnp.ones(2)}))
    message = (
        "must have a parameter of the file.*params/bias, params/kernel, .*`like` with params/w"
    )
    with pytest.raises(ol.CheckpointMismatch, match=message):
        ol.restore(path, step.init(W))


def test_strict_lists_what_differs_with_the_nearest_names(path):
    step = built("SGD", quadratic)
    ol.save(path, step.init({"kernel": jnp.ones(2), "bias": jnp.ones(2)}))
    like = step.init({"kernal": jnp.ones(2), "bias": jnp.ones(2)})
    with pytest.raises(ol.CheckpointMismatch) as error:
        ol.restore(path, like, strict=True)
    assert "Only in `like`: 'params/kernal' (nearest: 'params/kernel')" in str(error.value)
    assert "Only in the file: 'params/kernel' (nearest: 'params/kernal')" in str(error.value)
    _, report = ol.restore(path, like)
    assert str(report).splitlines()[0] == "6 matched, 1 new, 1 unused"
    assert report.new == ("params/kernal",)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64"]
)
@pytest.mark.parametrize("bucket", [None, "auto"])
def test_every_kind_of_leaf_comes_back(path, dtype, bucket):
    tree = {
        "w": jnp.arange(6.0).reshape(2, 3).astype(dtype),
        "more": jnp.ones(3, dtype),
        "none": jnp.zeros((0, 3)),
        "number": 2.0,
        "whole": jnp.arange(3),
        "flag": jnp.array(True),
        "keys": jax.random.split(jax.random.key(3), 2),
    }
    step = built("Adam", lambda p, x: jnp.sum(p["number"] * x), bucket=bucket)
    if dtype.startswith("float8"):
        step = built("Adam", lambda p, x: jnp.sum(p["number"] * x), variables=["number"])
    state = step.init(tree)
    ol.save(path, state)
    again, _ = ol.restore(path, step.init(jax.tree.map(jnp.copy, tree)), strict=True)
    assert_equal(again, state)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.dtype, y.dtype), again, state)
    assert jax.random.key_impl(again.params["keys"]) == jax.random.key_impl(tree["keys"])


def test_a_parameter_that_is_the_whole_tree(path):
    step = built("Adam", lambda p, x: jnp.sum((p * x) ** 2))
    state, _ = step(step.init(jnp.ones(3)), 2.0)
    ol.save(path, state)
    again, _ = ol.restore(path, step.init(jnp.zeros(3)), strict=True)
    assert_equal(again, state)
