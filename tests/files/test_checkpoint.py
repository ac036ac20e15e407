"""A restored state goes on bit for bit, across edits of links, layouts and devices."""

import dataclasses
import json
import pathlib
import re
import resource
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import optimize_loss
from optimize_loss import optimizers as optim
from optimize_loss._files.named import on_host
from optimize_loss._files.safetensors import FORMAT
from tests.cases import SubtractMean, on_eight_devices, random_like
from tests.golden import golden_data

# Untyped, since what some of these tests pass is wrong on purpose.
ol: Any = optimize_loss
T = optimize_loss.transforms
SHAPES = {"dense": {"bias": (2,), "kernel": (3, 2)}, "head": {"kernel": (2, 2)}}
X = random_like({"x": (50, 4, 3)}, 7)["x"]


def loss(params, x, *, key):
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    noise = 0.1 * jax.random.normal(key, hidden.shape)
    return jnp.mean((hidden + noise) @ params["head"]["kernel"] - 1.0) ** 2


def built(optimizer: Any = "Adam", function: Any = loss, **options: Any) -> Any:
    if isinstance(optimizer, str):
        options = {"learning_rate": 0.01, **options}
    return ol.optimize_loss(function, optimizer=optimizer, **options)


def params(seed=0, **more):
    return random_like({**SHAPES, **more}, seed)


def saved(step, path, steps=3, state=None):
    """Return the leaves by name after some steps, saved in a file."""
    state = step.init(params()) if state is None else state
    state, _ = step.many(state, X[:steps])
    ol.save(path, state)
    return on_host(state)


def assert_matched(state, report, wanted):
    got = on_host(state)
    for name in report.matched:
        assert got[name].tobytes() == wanted[name].tobytes(), name
        assert (got[name].dtype, got[name].shape) == (wanted[name].dtype, wanted[name].shape)


def assert_equal(one, other):
    ours, theirs = on_host(one), on_host(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


SGD, LION = optim.SGD(0.01), optim.Lion(0.001)
WRAPPED = {
    "LossScaleOptimizer": optim.LossScaleOptimizer(optim.Adam(0.01), initial_scale=8.0),
    "MultiOptimizer": optim.MultiOptimizer({"**/bias": SGD}, default_optimizer=LION),
    "MomentumOptimizer": optim.MomentumOptimizer(0.01, 0.9),
    "optax-adamw": optax.adamw(0.01),
    "optax-adafactor": optax.adafactor(0.01),
    "optax-in-a-chain": T.chain(
        clip=T.ClipByGlobalNorm(1.0), trace=optax.trace(0.9), rate=T.ScaleByLearningRate(0.01)
    ),
    "tree-link": T.chain(mean=SubtractMean(0.5), rate=T.ScaleByLearningRate(0.01)),
    "accumulated": T.chain(
        gather=T.Accumulate(3), adam=T.ScaleByAdam(), rate=T.ScaleByLearningRate(0.01)
    ),
    "noise-and-clip": T.chain(
        noise=T.AddNoise(0.01),
        clip=T.ClipByAdaptiveNorm(),
        adam=T.ScaleByAdam(),
        rate=T.ScaleByLearningRate(0.01),
    ),
    "average": optim.Adam(0.01, use_ema=True, ema_momentum=0.9),
}
OPTIMIZERS = sorted({*optim.names(), *ol.OPTIMIZER_CLS_NAMES, *WRAPPED})


def optimizer_of(name):
    if name in WRAPPED or name in ol.OPTIMIZER_CLS_NAMES:
        return WRAPPED.get(name, name)
    return getattr(optim, name)(0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_resume_is_bit_exact_for_50_more_steps(path, name):
    step = built(optimizer_of(name), summaries=[])
    with jax.numpy_dtype_promotion("standard" if "optax" in name else "strict"):
        state, _ = step.many(step.init(params()), X)
        ol.save(path, state)
        again, report = ol.restore(path, step.init(params(1)), strict=True)
        assert set(report.matched) == set(on_host(state))
        assert_equal(again, state)
        state, metrics = step.many(state, X)
        again, metrics_again = step.many(again, X)
    assert_equal(again, state)
    np.testing.assert_array_equal(metrics_again["loss"], metrics["loss"])


def of(*names, slots=("m", "v"), link="adam"):
    """Return the names of the slots of these parameters."""
    return {f"optimizer/{link}/{slot}/{name}" for slot in slots for name in names}


def links(**changed):
    made = {
        "clip": T.ClipByValue(1.0),
        "adam": T.ScaleByAdam(),
        "rate": T.ScaleByLearningRate(0.01),
    }
    return T.chain(**{name: x for name, x in (made | changed).items() if x is not None})


def first_of(link, **rest):
    return T.chain(**link, **dict(links(**rest).links))


class Edit:
    """What changes between a save and the restore, and what the report must say."""

    def __init__(self, before, after, new=(), unused=(), start=None, rename=None, where="dense"):
        self.before, self.after, self.start, self.rename = before, after, start, rename
        self.new, self.unused, self.where = set(new), set(unused), where


def renamed_loss(params, x, *, key):
    return loss({"dense": params["body"]["first"], "head": params["head"]}, x, key=key)


def wider_loss(params, x, *, key):
    return loss(params, x, key=key) + jnp.sum(params["scale"] ** 2)


NAMES = ("dense/bias", "dense/kernel", "head/kernel")
PLAIN = built(links())
EDITS = {
    "add-clip": Edit(
        PLAIN, built(first_of({"norm": T.ClipByGlobalNorm(1.0)})), {"optimizer/norm/max_norm"}
    ),
    "remove-clip": Edit(PLAIN, built(links(clip=None)), (), {"optimizer/clip/max_value"}),
    "add-noise": Edit(
        PLAIN,
        built(links(), gradient_noise_scale=0.1),
        {"optimizer/gradient_noise/scale", "optimizer/gradient_noise/seed"},
    ),
    "reorder-links": Edit(
        PLAIN,
        built(
            T.chain(
                **dict(reversed([x for x in links().links if x[0] != "rate"])),
                rate=T.ScaleByLearningRate(0.01),
            )
        ),
    ),
    "rename": Edit(
        PLAIN,
        built(links(), renamed_loss),
        start=lambda p: {"body": {"first": p["dense"]}, "head": p["head"]},
        rename={"dense": "body/first"},
        where="body/first",
    ),
    "unfreeze": Edit(
        built(links(), variables=["head/**"]), PLAIN, of("dense/bias", "dense/kernel")
    ),
    "freeze": Edit(
        PLAIN, built(links(), variables=["head/**"]), (), of("dense/bias", "dense/kernel")
    ),
    "add-a-parameter": Edit(
        PLAIN,
        built(links(), wider_loss),
        {"params/scale"} | of("scale"),
        start=lambda p: {**p, "scale": jnp.ones(3)},
    ),
    "bucket-on-to-off": Edit(built(links(), bucket="auto"), built(links(), bucket=None)),
    "bucket-off-to-on": Edit(built(links(), bucket=None), built(links(), bucket="auto")),
    "bucket-of-others": Edit(built(links(), bucket=4), built(links(), bucket=5)),
    "accumulate-1-to-4": Edit(
        PLAIN,
        built(first_of({"gather": T.Accumulate(4)})),
        of(*NAMES, slots=["sum"], link="gather")
        | {"optimizer/gather/every", "optimizer/gather/gathered"},
    ),
    "add-ema": Edit(
        PLAIN,
        built(links(ema=T.AverageParams(0.9))),
        of(*NAMES, slots=["average"], link="ema") | {"optimizer/ema/decay"},
    ),
    "add-amsgrad": Edit(
        PLAIN, built(links(adam=T.ScaleByAdam(amsgrad=True))), of(*NAMES, slots=["v_max"])
    ),
    "other-rule": Edit(
        PLAIN,
        built(links(adam=None, lion=T.ScaleByLion())),
        of(*NAMES, slots=["m"], link="lion") | {"optimizer/lion/beta_1", "optimizer/lion/beta_2"},
        of(*NAMES) | {f"optimizer/adam/{x}" for x in ("beta_1", "beta_2", "epsilon")},
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_restore_after_an_edit(path, name):
    edit = EDITS[name]
    wanted = saved(edit.before, path)
    like = edit.after.init((edit.start or (lambda p: p))(params(1)))
    fresh = on_host(like)
    state, report = ol.restore(path, like, rename=edit.rename)
    assert (set(report.new), set(report.unused)) == (edit.new, edit.unused)
    assert set(report.matched) == set(fresh) - edit.new
    assert len(report.matched) == len(wanted) - len(edit.unused)
    if edit.rename:
        wanted = {n.replace("dense", edit.where): x for n, x in wanted.items()}
    assert_matched(state, report, wanted)
    for leaf, old in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert (leaf.committed, leaf.sharding) == (old.committed, old.sharding)
        assert leaf.unsafe_buffer_pointer() != old.unsafe_buffer_pointer()
    state, metrics = edit.after.many(state, X[:3])
    assert np.isfinite(metrics["loss"]).all()
    assert int(state.step) == (3 if "accumulate" in name else 6)


@pytest.mark.parametrize("before", [None, "auto"])
@pytest.mark.parametrize("after", [None, "auto"])
def test_layouts_do_not_matter_for_what_follows(path, before, after):
    first, second = (built(links(), bucket=bucket) for bucket in (before, after))
    state, _ = first.many(first.init(params()), X[:5])
    ol.save(path, state)
    again, _ = ol.restore(path, second.init(params(1)), strict=True)
    assert again.layout is None if after is None else again.layout is not None
    straight = second.init(params()).with_trees(state.params, state.optimizer)
    straight = dataclasses.replace(straight, key=state.key)
    assert_equal(again, straight)
    assert_equal(second.many(again, X[:5])[0], second.many(straight, X[:5])[0])


def test_like_is_not_changed_and_stays_usable(path):
    saved(PLAIN, path)
    like = PLAIN.init(params(1))
    before = {name: x.copy() for name, x in on_host(like).items()}
    state, _ = ol.restore(path, like)
    PLAIN(state, X[0])
    for name, x in on_host(like).items():
        assert x.tobytes() == before[name].tobytes(), name
    PLAIN(like, X[0])


def test_a_restored_state_compiles_nothing_anew(path, caplog):
    step = built(links())
    saved(step, path)
    like = step.init(params())
    with jax.log_compiles(), caplog.at_level("WARNING"):
        caplog.clear()
        state, _ = ol.restore(path, like)
        step.many(state, X[:3])
    assert "jit(_take" not in caplog.text


def test_a_copy_of_the_parameters_begins_from_the_restored_ones(path):
    wanted = saved(PLAIN, path)
    after = built(links(ema=T.AverageParams(0.9)))
    state, _ = ol.restore(path, after.init(params(1)))
    got = on_host(state)
    for name in NAMES:
        np.testing.assert_array_equal(
            got[f"optimizer/ema/average/{name}"], wanted[f"params/{name}"]
        )
    # But an average that has begun in `like` goes on.
    like, _ = after(after.init(params(1)), X[0])
    begun = on_host(like)
    state, _ = ol.restore(path, like)
    for name in NAMES:
        average = f"optimizer/ema/average/{name}"
        np.testing.assert_array_equal(on_host(state)[average], begun[average])


@dataclasses.dataclass(frozen=True)
class KeepCopies(T.TreeLink):
    """A link of a user's that keeps a multiple of each parameter."""

    factor: float = 2.0

    def init(self, params):
        return {"copy": {name: 2 * p for name, p in params.items()}}

    def run(self, updates, slots, params, k):
        return updates, slots


FREE = optax.contrib.schedule_free_sgd(0.1)
COPIES = {
    "optax": ({"optimizer": FREE}, "optimizer/optimizer/z/", NAMES, 1),
    "of-a-rule": (
        {"optimizer": "SGD", "rules": {"head/**": {"optimizer": FREE}}},
        "optimizer/rule.optimizer/state/z/",
        NAMES[2:],
        1,
    ),
    "optax-of-some": (
        {"optimizer": FREE, "variables": ["dense/**"]},
        "optimizer/optimizer/z/",
        NAMES[:2],
        1,
    ),
    "tree-link": (
        {"optimizer": links(copies=KeepCopies())},
        "optimizer/copies/copy/",
        NAMES,
        2,
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_sees_the_whole_tree_begins_from_the_restored_parameters(path, name):
    options, slot, names, factor = COPIES[name]
    wanted = saved(built("SGD"), path)
    step = built(**options)
    with jax.numpy_dtype_promotion("standard"):
        like = step.init(params(1))
        state, report = ol.restore(path, like)
        got = on_host(state)
        assert [n for n in report.new if n.startswith(slot)] == [f"{slot}{n}" for n in names]
        for parameter in names:
            array = got[f"{slot}{parameter}"]
            np.testing.assert_array_equal(array, factor * wanted[f"params/{parameter}"])
        step(state, X[0])
        # But one that has gone on in `like` goes on.
        like, _ = step.many(like, X[:3])
        begun = on_host(like)
        state, _ = ol.restore(path, like)
    for parameter in names if factor == 1 else ():
        array = on_host(state)[f"{slot}{parameter}"]
        np.testing.assert_array_equal(array, begun[f"{slot}{parameter}"])


SIZES = {"big": (80, 64), "a": (3,), "b": (2,)}  # small ones have 16 bits where 8 are asked for
ROUNDED = {"optimizer/round_params/seed"}
MOMENTS = {
    "float32": of("big", "a", "b"),
    "bfloat16": of("big", "a", "b", slots=["m+v_bf16"]) | ROUNDED,
    "float8": of("big", slots=["m+v_f8", "m+v_scale"]) | of("a", "b", slots=["m+v_bf16"]) | ROUNDED,
}


@pytest.mark.parametrize("before", MOMENTS)
@pytest.mark.parametrize("after", MOMENTS)
@pytest.mark.parametrize("bucket", ["auto", None])
def test_moments_in_another_precision_are_new(path, before, after, bucket):
    def fits(params, x):
        return sum(jnp.sum((leaf - x) ** 2) for leaf in params.values())

    first, second = (
        built("AdamW", fits, precision=precision, bucket=bucket) for precision in (before, after)
    )
    state, _ = first.many(first.init(random_like(SIZES, 0)), jnp.arange(3.0))
    ol.save(path, state)
    wanted = on_host(state)
    like = second.init(random_like(SIZES, 1))
    fresh = on_host(like)
    again, report = ol.restore(path, like)
    ours, theirs = MOMENTS[after], MOMENTS[before]
    assert (set(report.new), set(report.unused)) == (ours - theirs, theirs - ours)
    assert set(report.matched) == set(fresh) - (ours - theirs)
    assert_matched(again, report, wanted)
    for name in report.new:
        np.testing.assert_array_equal(on_host(again)[name], fresh[name])
    if before != after:
        with pytest.raises(ol.CheckpointMismatch, match=r"Only in the file: 'optimizer/adam/m"):
            ol.restore(path, like, strict=True)
    again, metrics = second.many(again, jnp.arange(3.0))
    assert np.isfinite(metrics["loss"]).all()
    if before == after:
        assert_equal(again, first.many(state, jnp.arange(3.0))[0])


def test_numbers_that_were_set_come_back(path):
    state = PLAIN.init(params()).set(learning_rate=0.5, step=7)
    saved(PLAIN, path, state=state)
    with pytest.warns(
        UserWarning, match=r"optimizer/rate/learning_rate.*set\(learning_rate=None\)"
    ):
        state, report = ol.restore(path, PLAIN.init(params()))
    assert state.optimizer["rate"]["learning_rate"] == 0.5
    assert report.changed == ("optimizer/rate/learning_rate",)
    assert int(state.step) == 10
    assert state.set(learning_rate=None).optimizer["rate"]["learning_rate"] == np.float32(0.01)


def test_schedules_and_numbers(path):
    rate = ol.schedules.ExponentialDecay(0.1, 5, 0.5)
    follows = built(links(rate=T.ScaleByLearningRate(rate)))
    name = "optimizer/rate/learning_rate"
    saved(follows, path)
    state, report = ol.restore(path, follows.init(params()), strict=True)
    assert report.changed == ()
    # A schedule that is gone leaves the number that is built in.
    state, report = ol.restore(path, PLAIN.init(params()))
    assert (report.new, report.unused) == ((name,), (name,))
    assert state.optimizer["rate"]["learning_rate"] == np.float32(0.01)
    with pytest.raises(ol.CheckpointMismatch, match="Only in `like`: 'optimizer/rate/learning"):
        ol.restore(path, PLAIN.init(params()), strict=True)
    # A number takes the place of a schedule, as in `set`, and the report tells.
    saved(PLAIN, path)
    with pytest.warns(UserWarning, match="and those of the file are taken") as seen:
        state, report = ol.restore(path, follows.init(params()))
    assert [x.filename for x in seen] == [__file__]
    assert report.changed == (name,)
    assert state.optimizer["rate"]["learning_rate"] == np.float32(0.01)


def test_the_warning_has_the_call_that_gives_back_what_was_built_in(path):
    step = built(
        T.chain(
            multiply=T.MultiplyGradients({"dense/bias": 2.0}),
            first=T.ScaleByLearningRate(0.5),
            adam=T.ScaleByAdam(),
            rate=T.ScaleByLearningRate(0.01),
        )
    )
    changed = {"multiply/dense/bias": 3.0, "rate/learning_rate": 0.2, "epsilon": 1e-3}
    fresh = step.init(params())
    ol.save(path, fresh.set(**changed))
    with pytest.warns(UserWarning, match="multiply/dense/bias") as seen:
        state, report = ol.restore(path, fresh)
    assert len(report.changed) == 3
    call = str(seen[0].message).split("`")[-2]
    assert "'epsilon': None, 'multiply/dense/bias': None, 'rate/learning_rate': None" in call
    assert_equal(eval(call, {"state": state}), fresh)


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


def quadratic(params, x):
    return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(params)) * x


def mismatch(theirs, ours):
    return built("SGD", quadratic).init(theirs), built("SGD", quadratic).init(ours)


W = {"w": jnp.ones((2, 3))}
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
    assert str(report).splitlines()[0] == "5 matched, 1 new, 1 unused"
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


@dataclasses.dataclass
class Model:
    kernel: Any
    layers: tuple[Any, ...]


jax.tree_util.register_dataclass(Model, ["kernel", "layers"], [])


def test_the_keys_of_a_file_are_names(path):
    model = Model(jnp.ones((2, 2)), (jnp.ones(2), {"bias": jnp.ones(1)}))
    ol.save(path, built("Adam", quadratic).init(model))
    names = [*safetensors.numpy.load_file(path)]
    of_model = ["kernel", "layers/0", "layers/1/bias"]
    wanted = [f"params/{name}" for name in of_model]
    wanted += [f"optimizer/adam/{slot}/{name}" for slot in ("m", "v") for name in of_model]
    wanted += [f"optimizer/adam/{name}" for name in ("beta_1", "beta_2", "epsilon")]
    wanted += ["optimizer/rate/learning_rate", "optimizer/step", "first_step"]
    assert sorted(names) == sorted([*wanted, "optimizer/gradient_norm/norm"])


def test_a_sweep_of_states_comes_back(path):
    step = built("Adam", quadratic)
    like = step.init({"a": jnp.ones(2), "b": jnp.zeros(3)})
    sweep = jax.vmap(lambda rate: like.set(learning_rate=rate))
    state = sweep(jnp.array([0.1, 0.2]))
    ol.save(path, state)
    with pytest.warns(UserWarning, match="optimizer/rate/learning_rate"):
        again, _ = ol.restore(path, sweep(jnp.array([0.0, 0.0])), strict=True)
    assert_equal(again, state)
    assert_equal(jax.vmap(step, (0, None))(again, 1.0)[0], jax.vmap(step, (0, None))(state, 1.0)[0])


def memory_used():
    """Return what a save and a restore add to the most memory so far, in parts of a state.

    That was two states, in `init`, which copies one.
    """
    leaf, count = 2**21, 16
    step = built("SGD", lambda p, x: sum(jnp.sum(leaf * x) for leaf in p.values()))
    like = step.init({f"p{i}": jnp.full(leaf, i, jnp.float32) for i in range(count)})

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    with tempfile.TemporaryDirectory() as folder:
        ol.save(f"{folder}/small", step.init({"p0": jnp.zeros(1)}))
        peaks = [peak()]
        ol.save(f"{folder}/a", like)
        peaks.append(peak())
        state, _ = ol.restore(f"{folder}/a", like, strict=True)
        peaks.append(peak())
    assert float(state.params["p9"][-1]) == 9
    return json.dumps([int(x) / (4 * leaf * count) for x in np.diff(peaks)])


def test_a_leaf_at_a_time_is_in_memory():
    to_save, to_restore = on_eight_devices(__name__, "memory_used")
    assert to_save == 0
    assert to_restore < 0.5  # two states, and a leaf or two


def test_a_thousand_leaves(path):
    tree = {f"p{i}": jnp.full(2, i, jnp.float32) for i in range(1000)}
    step = built("Adam", quadratic)
    state = step.init(tree)
    ol.save(path, state)
    again, report = ol.restore(path, step.init(jax.tree.map(jnp.zeros_like, tree)), strict=True)
    assert len(report.matched) == 3007
    assert_equal(again, state)


GOLDEN = golden_data.FOLDER


def every_kind(seed):
    """Return a step, its state with all kinds of leaves, and a batch: as in the recorded files."""
    x = random_like({"x": (3, 2)}, 9)["x"]

    def fits(params, x, *, model_state, key):
        noise = jax.random.normal(key, x.shape)
        wave = jnp.sum(jnp.abs(params["wave"]) ** 2)
        out = jnp.sum((x + noise) * params["w"][None]) + params["half"].astype("float32").sum()
        return out**2 + wave, ol.Aux(model_state={"seen": model_state["seen"] + len(x)})

    tree = {
        "w": random_like((2,), seed),
        "half": random_like((3,), seed, jnp.bfloat16),
        "wave": random_like((2,), seed, jnp.complex64),
        "count": jnp.arange(3) + seed,
        "flags": jnp.array([True, False]),
        "none": jnp.zeros((0, 2)),
    }
    step = ol.optimize_loss(
        fits, learning_rate=0.1, clip_gradients=1.0, variables=["half", "w", "wave"]
    )
    return step, step.init(tree, model_state={"seen": jnp.zeros((), jnp.int32)}), x


def write_golden(path):
    """Write a file for the tests of later versions; return the state one step after it."""
    step, state, x = every_kind(0)
    state, _ = step(state, x)
    ol.save(path, state)
    state, _ = step(state, x)
    return state


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_files_of_every_version_are_read(path, version):
    step, like, x = every_kind(1)
    state, report = ol.restore(GOLDEN / f"format_{version}.safetensors", like, strict=True)
    assert len(report.matched) == len(on_host(like))
    straight = write_golden(path)
    state, _ = step(state, x)
    wanted = on_host(straight)
    for name, array in on_host(state).items():
        # The recorded step was taken by another compiler, perhaps.
        wide = [np.asarray(x, np.complex128) for x in (array, wanted[name])]
        rtol = 1e-2 if array.dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(*wide, rtol=rtol, err_msg=name)


def donated():
    step = built("SGD", quadratic)
    state = step.init(W)
    step(state, 1.0)
    return state


BAD: dict[str, tuple[Callable[[pathlib.Path], Any], type[Exception], str]] = {
    "device": (
        lambda p: ol.save("/dev/full", PLAIN.init(params())),
        ValueError,
        "must not be a device.*'/dev/full'",
    ),
    "folder": (lambda p: ol.save(p.parent, PLAIN.init(params())), IsADirectoryError, "directory"),
    "restore-a-folder": (
        lambda p: ol.restore(p.parent, PLAIN.init(params())),
        IsADirectoryError,
        "directory",
    ),
    "bytes": (lambda p: ol.save(bytes(p), PLAIN.init(params())), TypeError, "`path` must be"),
    "donated": (lambda p: ol.save(p, donated()), RuntimeError, "was donated"),
    "no-state": (lambda p: ol.save(p, W), TypeError, "`state` must be a TrainState"),
    "turned": (lambda p: ol.save(PLAIN.init(params()), p), TypeError, "`path` must be the path"),
    "abstract": (
        lambda p: ol.save(p, jax.eval_shape(PLAIN.init, params())),
        TypeError,
        "must have values",
    ),
    "traced": (
        lambda p: jax.jit(lambda s: ol.save(p, s))(PLAIN.init(params())),
        TypeError,
        "traced",
    ),
    "like": (lambda p: ol.restore(p, W), TypeError, "`like` must be a TrainState"),
    "strict": (
        lambda p: ol.restore(p, PLAIN.init(params()), strict=1),
        TypeError,
        "`strict` must be True",
    ),
    "missing": (lambda p: ol.restore(p, PLAIN.init(params())), FileNotFoundError, "a.safetensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(path, name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(path)
    assert not path.exists()


def on_devices(spread="params"):
    """Restore one file on 1, 2 and 8 devices, and take the same steps."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = {n: jax.make_mesh((n,), ("d",), auto, devices=jax.devices()[:n]) for n in (1, 2, 8)}
    spec = jax.sharding.PartitionSpec("d" if spread == "params" else None)
    axis = "d" if spread == "slots" else None

    def put(tree, n):
        whole = jax.sharding.NamedSharding(mesh[n], jax.sharding.PartitionSpec())
        split = jax.sharding.NamedSharding(mesh[n], spec)
        return {
            "w": jax.device_put(tree["w"], split),
            **{name: jax.device_put(tree[name], whole) for name in ("a", "b")},
        }

    def fits(params, x):
        return jnp.mean((x @ params["w"] + (params["a"] * params["b"])[None]) ** 2)

    step = ol.optimize_loss(fits, learning_rate=0.1, clip_gradients=1.0, shard_state=axis)
    tree = random_like({"w": (8, 3), "a": (3,), "b": (3,)}, 0)
    x = random_like({"x": (5, 4, 8)}, 1)["x"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        state, _ = step.many(step.init(put(tree, 8)), x)
        ol.save(f"{folder}/8", state)
        straight = on_host(state)
        for n in (1, 2, 8):
            like = step.init(put(random_like({"w": (8, 3), "a": (3,), "b": (3,)}, 2), n))
            again, report = ol.restore(f"{folder}/8", like, strict=True)
            got = on_host(again)
            m = again.optimizer["adam"]["m"]["w"]
            ol.save(f"{folder}/{n}", again)
            with open(f"{folder}/{n}", "rb") as one, open(f"{folder}/8", "rb") as other:
                same_file = one.read() == other.read()
            placed = {
                "devices": len(m.sharding.device_set),
                "rows": m.addressable_shards[0].data.shape[0],
                "params": again.params["w"].addressable_shards[0].data.shape[0],
                "placed": again.placement == like.placement,
            }
            after, _ = step.many(again, x)
            found[str(n)] = placed | {
                "same": all(got[k].tobytes() == straight[k].tobytes() for k in straight),
                "matched": len(report.matched) == len(straight),
                "same_file": same_file,
                "w": np.asarray(after.params["w"]).tolist(),
            }
    return json.dumps(found)


def with_slots_on_devices():
    return on_devices("slots")


@pytest.mark.parametrize("spread", ["params", "slots"])
def test_one_file_restores_on_1_2_and_8_devices(spread):
    function = "on_devices" if spread == "params" else "with_slots_on_devices"
    found = on_eight_devices(__name__, function)
    for n in (1, 2, 8):
        got = found[str(n)]
        assert got["same"]
        assert got["matched"]
        assert got["same_file"]
        assert got["placed"]
        assert got["params"] == (8 // n if spread == "params" else 8)
        assert (got["devices"], got["rows"]) == (n, 8 // n)
        np.testing.assert_allclose(got["w"], found["1"]["w"], rtol=1e-5, atol=1e-6)
