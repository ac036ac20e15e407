"""A restored state goes on bit for bit, across edits of links, layouts and devices."""

import dataclasses
import json
import pathlib
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

from optimize_loss import optimizers as optim
from optimize_loss._files.named import is_key, key_kind, on_host, outline
from optimize_loss._files.safetensors import FORMAT, write
from tests.cases import SubtractMean, on_eight_devices, random_like
from tests.files.saved import (
    LION,
    NAMES,
    PLAIN,
    SGD,
    T,
    W,
    X,
    assert_equal,
    built,
    links,
    ol,
    params,
    quadratic,
    saved,
)
from tests.golden import golden_data

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


def test_numbers_that_were_set_come_back(path):
    state = PLAIN.init(params()).set(learning_rate=0.5, step=7)
    saved(PLAIN, path, state=state)
    with pytest.warns(
        UserWarning, match=r"optimizer/rate/learning_rate.*set\(learning_rate=None\)"
    ):
        state, report = ol.restore(path, PLAIN.init(params()))
    assert state.optimizer["rate"]["learning_rate"] == 0.5
    assert report.from_file == ("optimizer/rate/learning_rate",)
    assert int(state.step) == 10
    assert state.set(learning_rate=None).optimizer["rate"]["learning_rate"] == np.float32(0.01)


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
    with pytest.warns(UserWarning, match="multipliers/dense/bias") as seen:
        state, report = ol.restore(path, fresh)
    assert len(report.from_file) == 3
    call = str(seen[0].message).split("`")[-2]
    assert "'epsilon': None, 'multipliers/dense/bias': None, 'rate/learning_rate': None" in call
    assert_equal(eval(call, {"state": state}), fresh)


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
    wanted += ["optimizer/rate/learning_rate", "optimizer/step", "first_step", "batches"]
    assert sorted(names) == sorted([*wanted, "optimizer/gradient_norm/norm"])


def test_an_older_file_has_as_many_batches_as_updates(path):
    step = built(links())
    state, _ = step.many(step.init(params()), X[:5])
    leaves = on_host(state)
    kinds = {name: key_kind(x) for name, x in outline(state).items() if is_key(x)}
    del leaves["batches"]
    write(path, leaves, {"keys": json.dumps(kinds), "versions": "{}"})
    again, report = ol.restore(path, step.init(params(1)), strict=True)
    assert "batches" in report.matched
    assert_equal(again, state)
    older = ol.to_state_dict(state)
    del older["batches"]
    assert_equal(ol.from_state_dict(step.init(params(1)), older), state)


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


@pytest.mark.slow
def test_a_leaf_at_a_time_is_in_memory():
    to_save, to_restore = on_eight_devices(__name__, "memory_used", alone=True)
    assert to_save == 0
    assert to_restore < 0.5  # two states, and a leaf or two


def test_a_thousand_leaves(path):
    tree = {f"p{i}": jnp.full(2, i, jnp.float32) for i in range(1000)}
    step = built("Adam", quadratic)
    state = step.init(tree)
    ol.save(path, state)
    again, report = ol.restore(path, step.init(jax.tree.map(jnp.zeros_like, tree)), strict=True)
    assert len(report.matched) == 3008
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


@pytest.mark.slow
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
