"""Small parameters in one array: nothing that a user sees changes, but for the time it takes."""

import collections
import dataclasses
import functools
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss._engine.link import by_entry
from optimize_loss._engine.members import Members
from tests.cases import on_eight_devices, random_like, rows
from tests.engine.packed import (
    OPTIMIZERS,
    T,
    adam,
    assert_alike,
    buckets_in,
    linear,
    steps_of,
)

SHAPES = {
    "encoder": [{"bias": (2,), "kernel": (3, 2)}, {"bias": (5,), "kernel": (2, 5)}],
    "empty": {"bias": (0,)},
    "scale": (),
    "shift": (),
}
SOME = {"encoder": [{"bias": (2,), "kernel": (3, 2)}], "empty": {"bias": (0,)}, "scale": ()}


def assert_same_run(plain, packed, params, batches, ulps):
    """Step both, and compare all that a user sees after each step."""
    one, two = plain.init(params), packed.init(params)
    assert_alike(two.params, one.params, 0)
    assert_alike(two.optimizer, one.optimizer, 0)
    for batch in batches:
        (one, said), (two, says) = plain(one, batch), packed(two, batch)
        assert_alike(two.params, one.params, ulps)
        assert_alike(two.optimizer, one.optimizer, ulps)
        assert_alike(says, said, ulps)
        assert two.step == one.step
    return one, two


def norm_ulps(case):
    """Return the units in which runs may differ.

    Sums over all gradients have another order. And of Nadam's many scalars XLA makes other
    kernels, where it contracts another product and sum into one operation; of others, newer ones
    than jax 0.10 make some that differ by the last bit.
    """
    links = [case.chain.link(name) for name, _ in case.chain.links]
    norms = [getattr(link, "needs", None) in ("global_norm", "health") for link in links]
    if any(norms) or any(isinstance(link, T.ScaleByNadam) for link in links):
        return 4
    return 0 if jax.__version_info__ < (0, 11) else 1


BY_THEMSELVES = {
    *("clip-norm", "clip-function", "noise", "noise-normal", "sum-over-axis", "lamb"),
    *("adafactor", "adafactor-absolute", "muon", "muon-plain", "observe-norms"),
    *("observe-histograms", "chain-contrib", "chain-adaptive", "chain-around-tree-link"),
    "chain-around-optax",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", rows())
def test_every_chain_gives_the_same_with_buckets(case):
    """Bit by bit, but for what a norm over all gradients enters; see `norm_ulps`."""
    plain, packed = steps_of(case.chain)
    batches = [case.random_like(SOME, t) for t in (1, 2, 3)]
    ulps = norm_ulps(case)
    one, two = assert_same_run(plain, packed, case.random_like(SOME, 0), batches, ulps)
    assert bool(two.layout and buckets_in(two)) == (case.name not in BY_THEMSELVES)
    assert one.layout is None


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_gives_the_same_with_buckets(name):
    shapes = SOME if name != "Muon" else {**SOME, "embedding": (4, 2)}
    optimizer = {**vars(ol.optimizers), **ol.OPTIMIZER_CLS_NAMES}[name]
    plain, packed = steps_of(None, optimizer=optimizer, clip_gradients=1.0)
    batches = [random_like(shapes, t) for t in (1, 2)]
    _, state = assert_same_run(plain, packed, random_like(shapes, 0), batches, 8)
    assert bool(state.layout) == (name not in ("Adafactor", "Lamb"))


BATCHES = [random_like(SHAPES, t) for t in (1, 2, 3)]


def test_many_steps_in_one_call_are_bit_equal():
    plain, packed = steps_of(adam())
    batches = jax.tree.map(lambda *xs: jnp.stack(xs), *BATCHES)
    one, said = plain.many(plain.init(random_like(SHAPES, 0)), batches)
    two, says = packed.many(packed.init(random_like(SHAPES, 0)), batches)
    assert_alike((two.params, two.optimizer, says), (one.params, one.optimizer, said), 0)


def test_more_different_numbers_than_a_few_give_the_same():
    params = {f"p{i}": jnp.full((i + 1,), 1.0) for i in range(7)}
    chain = T.chain(
        multiply=T.MultiplyGradients({f"p{i}": 0.5 + i for i in range(7)}),
        seen=T.ObserveNorm(),
        rate=T.ScaleByLearningRate(0.1),
    )
    assert_same_run(*steps_of(chain), params, [params, params], 4)


def mixed():
    """Every kind of leaf: dtypes, integers, flags, a random key, an empty part, no dimensions."""
    return {
        "f32": [jnp.ones(3), jnp.ones((2, 2))],
        "bf16": [jnp.ones(3, jnp.bfloat16), jnp.ones((), jnp.bfloat16)],
        "f16": (jnp.ones(3, jnp.float16), jnp.ones((0, 2), jnp.float16)),
        "complex": {"a": jnp.ones(2, complex) * 1j, "b": jnp.ones((1, 2), complex)},
        "counts": [jnp.arange(3), jnp.arange(4)],
        "flags": [jnp.ones(2, bool), jnp.zeros((), bool)],
        "key": jax.random.key(0),
        "nothing": {"none": None, "empty": []},
        "alone": jnp.ones((2, 3)),
    }


def of_mixed(params, scale):
    trained = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)]
    # Cubes, so that every gradient differs with its parameter, and the sum starts with them all.
    parts = [jnp.sum((x * x.conj() * x.real.astype(x.dtype)).real) for x in trained]
    return scale * functools.reduce(jnp.add, [p.astype(jnp.float32) for p in parts])


@pytest.mark.parametrize("clip", [None, 1.0])
def test_leaves_of_every_kind(clip):
    options = {"optimizer": "AdamW", "clip_gradients": clip, "summaries": []}
    plain, packed = steps_of(None, of_mixed, **options)
    _, state = assert_same_run(plain, packed, mixed(), [1.0, 2.0, 3.0], 4 if clip else 0)
    dtypes = collections.Counter(x.buffer.dtype.name for x in buckets_in(state))
    kinds = ["bfloat16", "bool", "complex64", "float16", "float32", "int32"]
    assert dtypes == dict.fromkeys(kinds, 1)


@pytest.mark.parametrize(
    ("bucket", "sizes"), [(3, {}), (4, {8: 1}), (6, {14: 1}), (7, {14: 1})], ids=str
)
def test_the_bound_is_the_most_entries_of_a_leaf(bucket, sizes):
    params = {"a": jnp.ones(4), "b": jnp.ones((2, 2)), "c": jnp.ones(6), "d": jnp.ones(8)}
    step = ol.optimize_loss(linear, learning_rate=0.1, bucket=bucket)
    state = step.init(params)
    found = buckets_in(state) if state.layout else []
    assert collections.Counter(x.buffer.size for x in found) == sizes
    assert state.packed_params["d"].shape == (8,)


def test_one_small_leaf_stays_by_itself():
    state = steps_of(None)[1].init({"a": jnp.ones(3), "b": jnp.ones(3, jnp.float16)})
    assert state.layout is None
    assert isinstance(state.packed_params, dict)


def partly(params, grads):
    """A loss that depends on some parameters only."""
    chosen = [(params[n], grads[n]) for n in ("scale", "encoder")]
    return linear(*map(list, zip(*chosen, strict=True)))


@pytest.mark.filterwarnings("ignore:The loss does not depend")
@pytest.mark.parametrize("variables", [None, ["encoder/**", "shift"]])
def test_members_without_a_gradient_stay_as_they_are(variables):
    def chains(first):
        return T.chain(
            **first,
            clip=T.ClipByGlobalNorm(0.5),
            momentum=T.ScaleByMomentum(0.9),
            decay=T.AddWeightDecay(0.1, exclude=("shift",)),
            rate=T.ScaleByLearningRate(0.1),
            ema=T.AverageParams(0.5),
        )

    for first in ({}, {"gate": T.Accumulate(2)}):
        plain, packed = steps_of(chains(first), partly, variables=variables)
        params = random_like(SHAPES, 0)
        start = packed.init(params).optimizer
        _, state = assert_same_run(plain, packed, params, BATCHES, 4)
        assert state.params["shift"] == params["shift"]
        assert state.optimizer["momentum"]["sum"]["shift"] == 0
        assert state.optimizer["ema"]["average"]["shift"] == start["ema"]["average"]["shift"]


def test_what_is_not_trained_has_no_slots_and_stays():
    plain, packed = steps_of(None, optimizer="AdamW", variables=["**/kernel"], summaries=[])
    _, state = assert_same_run(plain, packed, random_like(SHAPES, 0), BATCHES, 0)
    assert state.optimizer["adam"]["m"]["scale"] is None
    assert len(buckets_in(state)) == 2  # the trained, and the others


def test_numbers_are_set_by_name_and_nothing_is_traced_again():
    traced = []

    def loss(params, grads):
        traced.append(1)
        return linear(params, grads)

    step = dataclasses.replace(ol.optimize_loss(loss, learning_rate=1.0), chain=adam())
    state = step.init(random_like(SHAPES, 0))
    state, _ = step(state, BATCHES[0])
    stays, *moves = ({"learning_rate": 0.0}, {"learning_rate": 0.5}, {"step": 7}, {"beta_1": None})
    for values in (stays, *moves):
        before = np.asarray(state.params["scale"])
        state, _ = step(state.set(**values), BATCHES[1])
        assert (state.params["scale"] == before) == (values == stays)
    assert len(traced) == 1
    assert state.step == 9


def test_a_sweep_is_a_vmap_over_states():
    rates = jnp.array([0.1, 0.2, 0.3])
    plain, packed = steps_of(adam())
    swept = []
    for step in (plain, packed):
        state = step.init(random_like(SHAPES, 0))
        many = jax.vmap(lambda r, state=state: state.set(learning_rate=r))(rates)
        many, metrics = jax.vmap(step, in_axes=(0, None))(many, BATCHES[0])
        swept.append((many.params, many.optimizer, metrics, many.step))
        again = jax.vmap(lambda s: s.params)(many)
        assert_alike(again, many.params, 0)
    assert_alike(swept[1], swept[0], 1)
    assert swept[1][0]["encoder"][0]["kernel"].shape == (3, 3, 2)


def test_init_under_vmap_and_without_values():
    _, step = steps_of(adam())
    params = random_like(SHAPES, 0)
    states = jax.vmap(step.init)(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params))
    assert states.params["encoder"][1]["kernel"].shape == (2, 2, 5)
    shapes = jax.eval_shape(step.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(step.init(params))
    assert shapes.params["encoder"][0]["bias"].shape == (2,)
    assert shapes.optimizer["adam"]["m"]["scale"].shape == ()


def test_a_state_can_be_pickled_copied_and_taken_apart():
    _, step = steps_of(adam())
    state, _ = step(step.init(random_like(SHAPES, 0)), BATCHES[0])
    assert state.params is state.params
    again = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert hash(again.layout) == hash(state.layout)
    assert_alike(again.params, jax.device_get(state.params), 0)
    leaves, treedef = jax.tree.flatten(state)
    assert_alike(jax.tree.unflatten(treedef, leaves).optimizer, state.optimizer, 0)
    places = jax.tree.map(lambda x: x.sharding, state).params
    assert places["scale"] == state.params["scale"].sharding


def test_trees_can_be_put_back():
    _, step = steps_of(adam())
    first, other = (step.init(random_like(SHAPES, seed)) for seed in (0, 5))
    mixed = first.with_trees(other.params, step(other, BATCHES[0])[0].optimizer)
    other = step.init(random_like(SHAPES, 5))
    assert jax.tree.structure(mixed) == jax.tree.structure(other)
    assert_alike(mixed.params, other.params, 0)
    assert mixed.optimizer["step"] == 1
    assert_alike(first.with_trees().params, first.params, 0)


def test_a_donated_state_gave_its_buckets():
    _, step = steps_of(adam())
    state = step.init(random_like(SHAPES, 0))
    step(state, BATCHES[0])
    assert all(x.is_deleted() for x in jax.tree.leaves(state.packed_params))
    with pytest.raises(RuntimeError, match="donated"):
        step(state, BATCHES[0])


@dataclasses.dataclass(frozen=True)
class Doubled(T.ScaleByLearningRate):
    """A user's link, made from one of ours, that divides by a norm: not by entry."""

    def factor(self, k):
        return 2 * super().factor(k)


@dataclasses.dataclass(frozen=True)
class Wrong(T.Link):
    """A link by entry that gives what is no scalar for each parameter."""

    elementwise = True

    def for_each(self, names, k):
        return ({"k": jnp.full(2, float(i))} for i in range(len(names)))

    def leaf(self, update, slots, param, k):
        return update, slots


@dataclasses.dataclass(frozen=True)
class Broken(T.Link):
    elementwise = True

    def leaf(self, update, slots, param, k):
        return update[:1], slots


def test_links_of_users_are_safe():
    assert by_entry(T.ScaleByLearningRate)
    assert not by_entry(Doubled)
    assert not by_entry(T.Link)
    assert not by_entry(T.AddNoise)


@pytest.mark.parametrize(("link", "says"), [(Wrong(), "scalars"), (Broken(), "shape")], ids=str)
def test_errors_name_the_parameters(link, says):
    _, step = steps_of(T.chain(link=link))
    with pytest.raises(ValueError, match=says) as caught:
        step(step.init(random_like(SHAPES, 0)), BATCHES[0])
    if says == "shape":
        notes = " ".join(caught.value.__notes__)
        assert "'encoder/0/bias', 'encoder/0/kernel'" in notes
        assert "bucket" not in notes


MISSPELT = "encoder/0/bais"


@pytest.mark.parametrize(
    "chain",
    [
        adam(again=T.MultiplyGradients({MISSPELT: 2.0})),
        adam(rate_2=T.ForParameters(MISSPELT, T.ScaleByLearningRate(0.1))),
        adam(decay_2=T.AddWeightDecay(0.1, exclude=(MISSPELT,))),
    ],
    ids=["multiply", "for-parameters", "exclude"],
)
def test_patterns_are_checked_against_the_names_of_the_user(chain):
    said = []
    for step in steps_of(chain):
        with pytest.raises(ValueError, match="encoder/0/bias") as caught:
            step.init(random_like(SHAPES, 0))
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("bucket", [0, -1, 2.5, True, "some"])
def test_the_bound_is_checked(bucket):
    with pytest.raises(ValueError, match="`bucket`"):
        ol.optimize_loss(linear, learning_rate=0.1, bucket=bucket)


def test_names_of_buckets_avoid_those_of_parameters():
    params = {"bucket": {"float32": {"0": jnp.ones(2), "1": jnp.ones(3)}}}
    plain, packed = steps_of(None)
    assert_same_run(plain, packed, params, [params, params], 4)


def test_layouts_compare_quickly_and_rightly():
    a, b = (Members(("x", "y"), ((2,), (3, 2))) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Members(("x", "y"), ((2,), (2, 3)))
    assert a != ("x", "y")


@pytest.mark.parametrize(
    "program",
    [
        lambda state: jax.jit(lambda x: state.params["a"] * x)(2.0),
        lambda state: jax.eval_shape(lambda: state.params),
        lambda state: jax.jit(jax.vmap(lambda x: state.set(learning_rate=x)))(jnp.ones(2)),
        lambda state: jax.grad(lambda x: jnp.sum(state.params["a"] * x))(2.0),
    ],
    ids=["jit", "eval_shape", "vmap", "grad"],
)
def test_a_state_that_a_program_closes_over_stays_of_arrays(program):
    step = ol.optimize_loss(lambda p: jnp.sum(p["a"]) + jnp.sum(p["b"]), learning_rate=1.0)
    state = step.init({"a": jnp.arange(3.0), "b": jnp.ones(4)})
    program(state)
    np.testing.assert_array_equal(state.params["a"] + 1, [1, 2, 3])
    assert state.set(learning_rate=0.5).optimizer["rate"]["learning_rate"] == 0.5


@pytest.mark.parametrize("bucket", ["auto", None])
@pytest.mark.parametrize(
    ("new", "rule"),
    [
        (jnp.ones((3, 2)), r"at 'a' shape \(2, 3\) and dtype float32. Received: shape \(3, 2\)"),
        (jnp.ones((2, 3), jnp.bfloat16), "Received: .*bfloat16"),
        (jnp.ones((2, 3), jnp.int32), "Received: .*int32"),
        ([1.0], "must be an array|structure"),
    ],
)
def test_other_trees_must_be_like_those_of_the_state(bucket, new, rule):
    step = ol.optimize_loss(
        lambda p: jnp.sum(p["a"]) + jnp.sum(p["b"]), learning_rate=1.0, bucket=bucket
    )
    state = step.init({"a": jnp.zeros((2, 3)), "b": jnp.ones(4)})
    with pytest.raises((ol.TreeMismatch, ol.InvalidType), match=rule):
        state.with_trees({"a": new, "b": jnp.ones(4)})
    moved = state.with_trees({"a": jnp.ones((2, 3)), "b": jnp.ones(4)})
    np.testing.assert_array_equal(moved.params["a"], jnp.ones((2, 3)))


# On eight devices.


def sharded():
    """Return what a run over a mesh gives: with large leaves sharded, and small ones on all."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, rows_of = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def loss(params, x):
        y = jnp.tanh(x @ params["big"] + params["bias"]) @ params["out"] + params["last"]
        return jnp.mean(y * y)

    rng = np.random.default_rng(0)
    params = {
        "big": jax.device_put(rng.normal(size=(16, 8)).astype(np.float32), rows_of),
        "bias": jax.device_put(rng.normal(size=(1, 8)).astype(np.float32), everywhere),
        "out": jax.device_put(rng.normal(size=(8, 3)).astype(np.float32), everywhere),
        "last": jax.device_put(rng.normal(size=(1, 3)).astype(np.float32), everywhere),
    }
    x = jax.device_put(rng.normal(size=(32, 16)).astype(np.float32), rows_of)
    results = {}
    for colocate in (False, True):
        for bucket in (None, "auto"):
            traced = []

            def counted_loss(params, x, traced=traced):
                traced.append(1)
                return loss(params, x)

            step = ol.optimize_loss(
                counted_loss,
                learning_rate=0.1,
                clip_gradients=1.0,
                bucket=bucket,
                colocate_gradients_with_ops=colocate,
            )
            state = step.init(params)
            for _ in range(4):
                state, metrics = step(state, x)
            lowered = step.lower(step.init(params), x).compile().as_text() or ""
            results[f"{bucket} {colocate}"] = {
                "params": jax.tree.map(lambda p: np.asarray(p).tolist(), state.params),
                "loss": float(metrics["loss"]),
                "traced": len(traced),
                "compiled": step._programs[False, True]._cache_size(),
                "buckets": len(buckets_in(state)) if state.layout else 0,
                "sharded": str(state.params["big"].sharding.spec),
                "m": str(state.optimizer["adam"]["m"]["big"].sharding.spec),
                "whole": state.params["bias"].sharding.is_fully_replicated,
                "reductions": len(re.findall(r" all-reduce(?:-start)?\(", lowered)),
            }
    return json.dumps(results)


@pytest.mark.slow
def test_small_leaves_on_all_devices_share_an_array_and_sharded_ones_do_not():
    results = on_eight_devices(__name__, "sharded")
    for colocate in (False, True):
        plain, packed = results[f"None {colocate}"], results[f"auto {colocate}"]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            (packed["params"], packed["loss"]),
            (plain["params"], plain["loss"]),
        )
        assert packed["buckets"] == 1
        for name in ("traced", "compiled", "sharded", "m", "whole"):
            assert packed[name] == plain[name], name
        assert packed["whole"]
        assert packed["reductions"] <= plain["reductions"]
