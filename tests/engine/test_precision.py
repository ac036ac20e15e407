"""Moments and parameters in fewer bits: the bits themselves, and that nothing else changes."""

import dataclasses
import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss._engine.precision import Float8
from optimize_loss._names import leaf_names
from tests.cases import on_eight_devices, random_like

T = ol.transforms
SHAPES = {"a": {"bias": (5,), "kernel": (70, 80)}, "empty": (0,), "half": (7,), "scale": ()}


def params(dtype=jnp.bfloat16):
    made = random_like(SHAPES, 0)
    return {**made, "half": made["half"].astype(dtype)}


def loss(p, x):
    return sum(jnp.sum((leaf.astype(jnp.float32) - x) ** 2) for leaf in jax.tree.leaves(p))


BATCHES = np.array([0.3, -0.2, 1.5, 0.7], np.float32)


def build(precision: Any = "bfloat16", **options):
    options = {"learning_rate": 0.01, "optimizer": "AdamW", "summaries": ["loss"], **options}
    return ol.optimize_loss(loss, precision=precision, **options)


def trained(step, start=None, many=False):
    state = step.init(params() if start is None else start)
    if many:
        return step.many(state, BATCHES)[0]
    for x in BATCHES:
        state, _ = step(state, x)
    return state


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, a, b in zip(leaf_names(want), *map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def same_states(one, two):
    assert_same((one.params, one.optimizer), (two.params, two.optimizer))


# Parameters.


def moved(precision: Any, dtype=jnp.bfloat16, many=True, **options):
    def pull(p, x):
        return jnp.sum(p["w"].astype(jnp.float32)) * x

    step = ol.optimize_loss(
        pull, learning_rate=1.0, optimizer="SGD", precision=precision, **options
    )
    state = step.init({"w": jnp.ones(1000, dtype)})
    state, _ = step.many(state, jnp.full(200, 1e-3))
    return np.asarray(state.params["w"].astype(jnp.float32))


def test_small_updates_of_a_bfloat16_weight_count():
    """200 updates of 1e-3 from 1.0; to nearest, the first is lost, and so are all."""
    only_params = ol.Precision("float32")
    for precision in ("bfloat16", only_params):
        assert abs(moved(precision).mean() - 0.8) < 0.005
    np.testing.assert_array_equal(moved(None), 1.0)
    np.testing.assert_array_equal(moved("float32"), 1.0)


def test_small_updates_of_a_float16_weight_count():
    """Of 1e-3 a float16 at 1 rounds to the nearest 1/2048: all lead too far, or not far enough."""
    assert abs(moved("bfloat16", jnp.float16).mean() - 0.8) < 0.001
    assert abs(moved(None, jnp.float16).mean() - 0.8) > 0.003


def test_one_scalar_weight_drifts_as_told():
    """A single weight, on average over seeds: 200 updates of 1e-3 lead to 0.8."""

    def pull(p, x):
        return p["w"].astype(jnp.float32) * x

    ends = []
    for seed in range(40):
        step = ol.optimize_loss(
            pull, learning_rate=1.0, optimizer="SGD", precision="bfloat16", seed=seed
        )
        state, _ = step.many(step.init({"w": jnp.bfloat16(1)}), jnp.full(200, 1e-3))
        ends.append(float(state.params["w"]))
    assert abs(np.mean(ends) - 0.8) < 0.01


def test_update_returns_the_difference_to_the_rounded_sum():
    tx = T.chain(rate=T.ScaleByLearningRate(1.0), rounding=T.RoundParams(3))
    p = {"w": jnp.full(100, 1.0, jnp.bfloat16)}
    g = {"w": jnp.full(100, 1e-3)}
    updates, state = tx.update(g, tx.init(p), p)
    new, _ = tx.apply(g, state | {"step": jnp.int32(0)}, p)
    np.testing.assert_array_equal(np.asarray(p["w"] + updates["w"]), np.asarray(new["w"]))
    assert len(np.unique(np.asarray(new["w"], np.float32))) == 2


def test_parameters_that_are_not_finite_stay_so():
    tx = T.chain(rate=T.ScaleByLearningRate(1.0), rounding=T.RoundParams())
    p = jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    new, _ = tx.apply(jnp.full(3, 1e-3), tx.init(p), p)
    np.testing.assert_array_equal(np.asarray(new, np.float32), [np.inf, -np.inf, np.nan])


def test_an_average_is_of_what_is_stored():
    step = ol.optimize_loss(
        lambda p, x: jnp.sum(p["w"].astype(jnp.float32)) * x,
        learning_rate=1.0,
        optimizer="SGD",
        precision="bfloat16",
        ema=T.AverageParams(0.0),
    )
    state, _ = step(step.init({"w": jnp.ones(1000, jnp.bfloat16)}), 1e-3)
    assert [*dict(step.chain.links)][-2:] == ["round_params", "ema"]
    stored = np.asarray(state.params["w"], np.float32)
    np.testing.assert_array_equal(np.asarray(state.optimizer["ema"]["average"]["w"]), stored)
    assert len(np.unique(stored)) == 2


# Moments.

OPTIMIZERS = {
    "AdamW": {"bfloat16": 4, "float8": 2},
    "Lion": {"bfloat16": 2, "float8": 1},
    "RMSprop": {"bfloat16": 4, "float8": 2},
    "Adadelta": {"bfloat16": 4, "float8": 2},
}


@pytest.mark.parametrize("form", ["bfloat16", "float8"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_of_the_state(name, form):
    size = 1 << 20
    step = build(form, optimizer=name)
    state = jax.eval_shape(step.init, {"w": jax.ShapeDtypeStruct((size,), jnp.float32)})
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.packed_optimizer))
    moments = OPTIMIZERS[name][form]
    scales = moments * 4 / 256 if form == "float8" else 0
    assert 0 <= held / size - moments - scales < 1e-3


def test_8_bit_adamw_with_bfloat16_weights_takes_4_bytes_a_parameter():
    shapes = {"w": jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16)}
    state = jax.eval_shape(build("float8").init, shapes)
    arrays = jax.tree.leaves((state.packed_params, state.packed_optimizer))
    assert sum(x.size * x.dtype.itemsize for x in arrays) / (256 * 4096) < 4.05


def adamw(precision):
    tx = T.chain(
        clip=T.ClipByGlobalNorm(1.0),
        adam=T.ScaleByAdam(),
        decay=T.AddWeightDecay(1e-2),
        rate=T.ScaleByLearningRate(1e-3),
    )
    return T.with_precision(tx, precision)


@pytest.mark.parametrize("leaves", [1, 4])
def test_a_pair_makes_no_temporary_and_is_written_in_place(leaves):
    size, tx = 1 << 20, adamw("bfloat16")
    p = {f"p{i}": jax.ShapeDtypeStruct((size // leaves,), jnp.float32) for i in range(leaves)}
    program = jax.jit(lambda g, p, s: tx.apply(g, s, p), donate_argnums=(1, 2))
    compiled = program.lower(p, p, jax.eval_shape(tx.init, p)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.05 * size
    assert memory.alias_size_in_bytes >= 8 * size
    text = compiled.as_text() or ""
    root = next(line for line in text.splitlines() if "entry_computation" in line)
    assert f"u32[{size // leaves}]" in root.split("->")[1]
    assert "bf16[" not in text


@pytest.mark.parametrize("form", ["bfloat16", "float8"])
def test_moments_are_about_those_of_float32(form):
    """A bfloat16 is wrong by at most 2**-7 of itself, e4m3 by 2**-4 or 2**-10 of its block."""
    exact, rounded = trained(build(None)), trained(build(form))
    wrong = {"bfloat16": 0.05, "float8": 0.2}[form]
    for slot in ("m", "v"):
        for name in ("kernel", "bias"):
            want = np.asarray(exact.optimizer["adam"][slot]["a"][name])
            got = np.asarray(rounded.decoded["adam"][slot]["a"][name])
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=wrong, atol=wrong * abs(want).max() / 8)
    assert set(exact.optimizer["adam"]) == set(rounded.decoded["adam"])


MIXED = ol.Precision({"a/kernel": "float8", "a/*|scale": "bfloat16"})
PRECISIONS = {"bfloat16": "bfloat16", "float8": "float8", "mixed": MIXED}
BY_NAME = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


@BY_NAME
@pytest.mark.parametrize("name", ["AdamW", "Lion", "RMSprop", "Adamax"])
def test_buckets_change_nothing(name, precision):
    kept, alone = (trained(build(precision, optimizer=name, bucket=b)) for b in ("auto", None))
    assert kept.layout is not None
    assert alone.layout is None
    same_states(kept, alone)
    assert_same(kept.decoded, alone.decoded)


@BY_NAME
def test_many_steps_in_a_call_are_single_steps(precision):
    step = build(precision)
    same_states(trained(step, many=True), trained(step))


def test_a_parameter_is_rounded_alike_whatever_is_beside_it():
    step, start = build("bfloat16"), params()
    more = {**start, "another": jnp.ones((3, 3)), "zero": jnp.ones(9, jnp.bfloat16)}
    one, two = trained(step, start), trained(step, more)
    two_params = {name: two.params[name] for name in start}
    assert_same(one.params, two_params)
    slot = two.optimizer["adam"]["m+v_bf16"]
    assert_same(one.optimizer["adam"]["m+v_bf16"], {name: slot[name] for name in start})


def test_other_seeds_names_and_steps_round_otherwise():
    def ends(name="w", seed=0, steps=1):
        step = ol.optimize_loss(
            lambda p, x: jnp.sum(p[name].astype(jnp.float32)) * x,
            learning_rate=1.0,
            optimizer="SGD",
            precision="bfloat16",
            seed=seed,
        )
        state = step.init({name: jnp.ones(1000, jnp.bfloat16)})
        for _ in range(steps):
            state, _ = step(state, 1e-3)
        return np.asarray(state.params[name], np.float32)

    first = ends()
    np.testing.assert_array_equal(first, ends())
    for other in (ends("v"), ends(seed=1), ends(steps=2)):
        assert (first != other).sum() > 100


def test_a_seed_of_its_own_goes_before_that_of_the_step():
    one = build(ol.Precision(seed=5), seed=1)
    two = build("bfloat16", seed=5)
    same_states(trained(one), trained(two))


@BY_NAME
def test_a_state_under_vmap_is_each_alone(precision):
    step, rates = build(precision), np.array([0.01, 0.03], np.float32)
    states = jax.vmap(lambda rate: step.init(params()).set(learning_rate=rate))(rates)
    states, _ = jax.vmap(step, in_axes=(0, None))(states, BATCHES[0])
    for i, rate in enumerate(rates):
        alone, _ = step(step.init(params()).set(learning_rate=rate), BATCHES[0])
        own = jax.tree.map(lambda x, i=i: x[i], states)
        for a, b in zip(*map(jax.tree.leaves, (own.params, alone.params)), strict=True):
            np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2**-7
            )
        slots = ["m+v_bf16"] + (["m+v_f8"] if precision != "bfloat16" else [])
        for slot in slots:
            assert own.optimizer["adam"][slot]["a"].keys() == {"bias", "kernel"}


@BY_NAME
def test_a_batch_that_the_guard_leaves_out_leaves_no_bit(precision):
    step = build(precision, skip="nonfinite", accumulate=2)

    def run(batches):
        state = step.init(params())
        for x in batches:
            state, _ = step(state, x)
        return state

    sound = run(BATCHES)
    with_nan = run(np.insert(BATCHES, [0, 1, 3], np.nan))
    assert with_nan.optimizer["skip"]["skipped"] == 3
    assert_same(with_nan.params, sound.params)
    assert_same(with_nan.optimizer["adam"], sound.optimizer["adam"])


def test_micro_batches_round_once():
    """The sum stays float32; parameters change with the last of its batches alone."""
    step = build("bfloat16", accumulate=2)
    state = step.init(params())
    before = jax.device_get(state.params)
    state, _ = step(state, BATCHES[0])
    assert_same(jax.device_get(state.params), before)
    assert state.optimizer["accumulate"]["sum"]["half"].dtype == jnp.float32
    state, _ = step(state, BATCHES[1])
    assert (np.asarray(state.params["half"]) != before["half"]).any()


@BY_NAME
def test_all_is_donated_and_traced_once(precision):
    step = build(precision)
    state = step.init(params())
    compiled = step.lower(state, BATCHES[0]).compile()
    memory = compiled.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(state) if x.size)
    assert memory is not None
    assert memory.alias_size_in_bytes >= held - 8  # all but numbers that no one writes
    for x in BATCHES:
        state, _ = step(state, x)
    assert step._programs[False, True]._cache_size() == 1


@BY_NAME
def test_a_state_can_be_pickled_and_goes_on(precision):
    step = build(precision)
    state, _ = step(step.init(params()), BATCHES[0])
    copy = pickle.loads(pickle.dumps(state))
    again = pickle.loads(pickle.dumps(step))
    for x in BATCHES[1:]:
        state, _ = step(state, x)
        copy, _ = again(copy, x)
    same_states(state, copy)


def test_trees_can_be_taken_out_and_put_back():
    state = trained(build(MIXED))
    same_states(state.with_trees(state.params, state.optimizer), state)


def test_each_parameter_has_its_format_and_the_rest_float32():
    step = build(ol.Precision({"a/kernel": "float8", "a/bias": "bfloat16"}))
    mine = step.init(params()).optimizer["adam"]
    found = {slot: {n for n, x in _named(mine[slot]) if x is not None} for slot in mine}
    assert found["m+v_f8"] == found["m+v_scale"] == {"a/kernel"}
    assert found["m+v_bf16"] == {"a/bias"}
    assert found["m"] == found["v"] == {"empty", "half", "scale"}
    assert mine["m+v_f8"]["a"]["kernel"].dtype == jnp.uint16
    assert mine["m+v_scale"]["a"]["kernel"].shape == (2, 22)  # 5600 entries


def _named(tree):
    return zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)


def test_small_parameters_have_16_bits_in_place_of_8():
    shapes = {"small": (4096,), "large": (4097,)}
    mine = build("float8").init(random_like(shapes, 0)).optimizer["adam"]
    assert mine["m+v_bf16"]["small"].shape == (4096,)
    assert mine["m+v_f8"]["large"].shape == (4097,)
    assert mine["m+v_scale"]["large"].shape == (2, 17)


def test_blocks_of_zeros_and_of_what_is_not_finite():
    """What is not finite makes NaN of its block, and of no other."""
    x = np.zeros(1024, np.float32)
    x[256:512] = 1e-30
    x[512], x[513], x[514:768] = np.inf, np.nan, 3.0
    codec = Float8(((("m", False), ("v", True)),))
    stored = codec.encoded({"m": jnp.asarray(x), "v": jnp.abs(x)})
    for slot in codec.decoded(stored).values():
        got = np.asarray(slot)
        assert (got[:256] == 0).all()
        assert (got[768:] == 0).all()
        np.testing.assert_allclose(got[256:512], 1e-30, rtol=0.13)
        assert np.isnan(got[512:768]).all()


def test_complex_and_float64_moments_stay_whole():
    step = build(optimizer="Adam")
    start = {"c": jnp.ones(3, jnp.complex64), "r": jnp.ones(3)}
    step = dataclasses.replace(
        step, loss=ol.optimize_loss(lambda p, x: jnp.sum(abs(p["c"])) + x, 0, 0.1).loss
    )
    mine = step.init(start).optimizer["adam"]
    assert mine["m"]["c"].dtype == jnp.complex64
    assert mine["v_bf16"]["c"].dtype == jnp.uint16
    assert mine["m+v_bf16"]["r"].dtype == jnp.uint32


def test_a_link_of_a_user_says_what_its_moments_are():
    @dataclasses.dataclass(frozen=True)
    class Mean(T.Link):
        decay: T.Decay = 0.5
        elementwise = True
        means = ("mean",)

        def slots(self, param):
            return {"mean": jnp.zeros_like(param), "other": jnp.zeros_like(param)}

        def leaf(self, update, slots, param, k):
            mean = slots["mean"] + (update - slots["mean"]) * k["decay"][1]
            return mean, {"mean": mean, "other": slots["other"]}

    tx = T.with_precision(T.chain(mean=Mean(), rate=T.ScaleByLearningRate(1.0)), "bfloat16")
    p = {"w": jnp.zeros(3)}
    update, state = tx.update({"w": jnp.array([2.0, -4.0, 0.0])}, tx.init(p), p)
    assert set(state["mean"]) == {"decay", "mean_bf16", "other"}
    np.testing.assert_array_equal(np.asarray(update["w"]), [-1, 2, 0])
    np.testing.assert_array_equal(np.asarray(tx.decoded(state, p)["mean"]["mean"]["w"]), [1, -2, 0])


def test_a_chain_alone_does_what_the_option_does():
    tx = adamw("bfloat16")
    step = ol.optimize_loss(
        loss,
        optimizer=T.chain(**{n: x for n, x in tx.links if n not in ("clip", "round_params")}),
        clip_gradients=dict(tx.links)["clip"],
        precision="bfloat16",
        bucket=None,
    )
    state = step.init(params())
    p, held = params(), tx.init(params())
    for x in BATCHES:
        state, _ = step(state, x)
        p, held = jax.jit(tx.apply)(jax.grad(loss)(p, x), held, p)
    assert_same(p, state.params)
    assert_same(held["adam"], state.optimizer["adam"])


def test_precision_is_part_of_the_chain():
    one, two = adamw("bfloat16"), adamw("float8")
    assert one != two
    assert one == adamw("bfloat16") == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(adamw("bfloat16"))
    assert T.with_precision(adamw(None), "float32") == adamw(None)
    step = build("bfloat16")
    with pytest.raises(ol.TreeMismatch, match="precision"):
        build("float8")(step.init(params()), BATCHES[0])


ERRORS = {
    "name": (lambda: build("bf16"), ValueError, "`precision` must be one of"),
    "kind": (lambda: build(16), ol.InvalidType, "`precision` must be one of"),
    "state": (lambda: ol.Precision("int8"), ValueError, "`state` must be one of"),
    "state-kind": (lambda: ol.Precision(8), ol.InvalidType, "map patterns"),
    "pattern": (lambda: ol.Precision({3: "float8"}), ol.InvalidType, "must be a pattern"),
    "format-kind": (lambda: ol.Precision({"a": 8}), ol.InvalidType, "map patterns"),
    "params": (
        lambda: dataclasses.replace(ol.Precision(), params="random"),
        ValueError,
        "`params` must be one of",
    ),
    "seed": (lambda: ol.Precision(seed=-1), ValueError, "`seed` must be"),
    "unmatched": (
        lambda: build(ol.Precision({"a/kernal": "float8"})).init(params()),
        ValueError,
        "matches no parameter: 'a/kernal'. Nearest names: 'a/kernel'",
    ),
    "nothing": (
        lambda: build("bfloat16", optimizer="SGD").init({"w": jnp.ones(3)}),
        ValueError,
        "must have something to act on",
    ),
    "nothing-nearest": (
        lambda: build(ol.Precision("float32", "nearest")).init(params()),
        ValueError,
        "must have something to act on",
    ),
    "twice": (lambda: T.with_precision(adamw("float8"), "float8"), ValueError, "no precision yet"),
    "in-the-optimizer": (
        lambda: build(None, optimizer=adamw("float8"), learning_rate=None),
        ValueError,
        "give `precision` to `optimize_loss`",
    ),
    "name-taken": (
        lambda: T.with_precision(T.chain(round_params=T.ScaleByAdam()), "bfloat16"),
        ValueError,
        "other names than 'round_params'",
    ),
    "not-last": (
        lambda: T.chain(rounding=T.RoundParams(), rate=T.ScaleByLearningRate(0.1)),
        ValueError,
        "must come last",
    ),
}


@pytest.mark.parametrize(("make", "error", "text"), ERRORS.values(), ids=ERRORS)
def test_wrong_values_are_explained(make, error, text):
    with pytest.raises(error, match=text.replace("`", ".").replace("(", r"\(")):
        make()


def on_devices():
    """The same run on one device, and with the matrix spread over eight: by rows, by columns."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    start = {"w": jnp.ones((64, 1024)), "h": jnp.ones((64, 8), jnp.bfloat16)}

    def run(precision, spec=None):
        placed = start
        if spec is not None:
            placed = jax.device_put(start, NamedSharding(mesh, spec))
        state = trained(build(precision), placed)
        moments = state.optimizer["adam"]
        slot = "m+v_bf16" if precision == "bfloat16" else "m+v_f8"
        same = moments[slot]["w"].sharding.is_equivalent_to(state.params["w"].sharding, 2)
        return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(state.params)], same

    results = {}
    for precision in ("bfloat16", "float8"):
        alone, _ = run(precision)
        for spec in (P("x"), P(None, "x")):
            spread, placed_alike = run(precision, spec)
            equal = all(np.array_equal(a, b) for a, b in zip(alone, spread, strict=True))
            results[f"{precision}, {spec}"] = bool(equal and placed_alike)
    return json.dumps(results)


@pytest.mark.slow
def test_devices_change_nothing():
    found = on_eight_devices(__name__, "on_devices")
    assert len(found) == 4
    assert all(found.values()), found
