"""`TrainStep.run`: what single steps give, without waiting for them; and no batch or state lost.

Where numbers are derived by hand, the loss is w · x under a rate of 1: w loses the sum of the x.
"""

import dataclasses
import functools
import itertools
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from optimize_loss._step import run as run_module
from tests.cases import on_eight_devices
from tests.step.looped import Counted, Tensor, linear, ol, start


class Pair(NamedTuple):
    x: Any
    y: Any


def squares(params, x, y):
    error = jnp.mean((x @ params["w"] + params["b"] - y.astype(x.dtype)) ** 2)
    return error, ol.Aux(metrics={"seen": {"mean": x.mean(), "first": x[0]}})


def remembering(params, x, y, *, model_state, key):
    mean = 0.5 * model_state["mean"] + 0.5 * x.mean(0, keepdims=True)
    kept = jax.random.bernoulli(key, 0.5, x.shape)
    error = jnp.where(kept, x - mean, 0) @ params["w"] + params["b"] - y.astype(x.dtype)
    error = jnp.mean(error**2)
    return error, ol.Aux(metrics={"mean": mean}, model_state={"mean": mean})


PARAMS = {"w": np.full((3, 2), 0.5, np.float32), "b": np.zeros((1, 2), np.float32)}
STEPS = {
    "adam": lambda: (ol.optimize_loss(squares, learning_rate=0.1, name="a"), {}),
    "accumulate": lambda: (
        ol.optimize_loss(squares, optimizer=ol.optimizers.Adam(0.1, gradient_accumulation_steps=2)),
        {},
    ),
    "state-and-key": lambda: (
        ol.optimize_loss(
            remembering,
            learning_rate=0.1,
            gradient_noise_scale=0.1,
            moving_average_decay=0.9,
            summaries=ol.OPTIMIZER_SUMMARIES,
        ),
        {"model_state": {"mean": np.zeros((1, 3), np.float32)}},
    ),
}


def made(name):
    step, more = STEPS[name]()
    return step, step.init(PARAMS, **more)


def pairs(sizes):
    """Return a batch (x, y) of each size, from the host."""
    random = np.random.default_rng(0)
    return [
        (random.normal(size=(n, 3)).astype(np.float32), random.normal(size=(n, 2)))  # y: float64
        for n in sizes
    ]


def one_by_one(step, state, batches):
    """Return the last state and the metrics of single steps, as numpy arrays."""
    seen = []
    for batch in batches:
        state, metrics = step(state, *(batch if type(batch) in (tuple, list) else (batch,)))
        seen.append(jax.device_get(metrics))
    return state, jax.tree.map(lambda *xs: np.stack(xs), *seen)


OLDER_EMITTERS = "fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")


def numbers(leaf):
    """Return an array as numpy's; of random keys, what they consist of."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def bits(tree):
    return jax.tree.map(lambda x: (numbers(x).tobytes(), x.dtype, x.shape), tree)


def assert_same(ran, wanted):
    """Compare bit by bit; with XLA's older emitters, a norm may be summed otherwise by a last bit.

    XLA after that of jax 0.10 rounds otherwise in the body of a scan, by a few last bits.
    """
    state, metrics = ran
    if jax.__version_info__ >= (0, 11):
        near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(near, jax.tree.map(numbers, (state, metrics)), jax.tree.map(numbers, wanted))
        return
    assert bits(state) == bits(wanted[0])
    assert jax.tree.structure(metrics) == jax.tree.structure(wanted[1])
    for seen, leaf in zip(*map(jax.tree.leaves, (metrics, wanted[1])), strict=True):
        assert (type(seen), seen.dtype) == (np.ndarray, leaf.dtype)
        np.testing.assert_array_max_ulp(seen, leaf, maxulp=OLDER_EMITTERS)


@pytest.mark.parametrize("steps_per_call", [1, 3, 100])
@pytest.mark.parametrize("name", STEPS)
def test_bit_equal_to_single_steps(name, steps_per_call):
    step, state = made(name)
    wanted = one_by_one(step, state, pairs([4] * 7))
    _, state = made(name)
    assert_same(step.run(state, pairs([4] * 7), steps_per_call=steps_per_call), wanted)


@pytest.mark.parametrize("prefetch", [1, 2, 10])
def test_shapes_may_change_anywhere(prefetch):
    sizes = [4, 4, 4, 2, 4, 4, 1, 1]
    step = ol.optimize_loss(lambda p, x, y: squares(p, x, y)[0], learning_rate=0.1)
    wanted = one_by_one(step, step.init(PARAMS), pairs(sizes))
    ran = step.run(step.init(PARAMS), pairs(sizes), steps_per_call=3, prefetch=prefetch)
    assert_same(ran, wanted)


def test_a_metric_whose_shape_changes_is_a_list():
    def loss(params, x):
        more = {} if len(x) == 1 else {"spread": x.max() - x.min()}
        return jnp.mean(params["w"] * x), ol.Aux(metrics={"each": {"x": x}, **more})

    step = ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD")
    batches = [np.arange(n, dtype=np.float32) for n in (2, 2, 1, 3)]
    _, metrics = step.run(start(step), batches, steps_per_call=2)
    assert metrics["loss"].shape == (4,)
    assert [each["x"].tolist() for each in metrics["each"]] == [x.tolist() for x in batches]
    assert [None if s is None else float(s) for s in metrics["spread"]] == [1.0, 1.0, None, 2.0]


@pytest.mark.parametrize("steps_per_call", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: [Tensor(x), Tensor(y)],
        lambda x, y: (jnp.asarray(x), y),
        lambda x, y: Pair(x, y),
        lambda x, y: {"x": Tensor(x), "y": jnp.asarray(y)},
        lambda x, y: Pair(jnp.asarray(x), float(y.sum())),
    ],
    ids=["tuple", "list-of-tensors", "mixed", "named-tuple", "dict", "number"],
)
def test_kinds_of_batches(make, steps_per_call):
    def loss(params, *parts):
        x, y = jax.tree.leaves(parts)
        return jnp.mean(x @ params["w"] * y)

    step = ol.optimize_loss(loss, learning_rate=0.25, optimizer="SGD")
    init = lambda: step.init({"w": PARAMS["w"]})
    # whole numbers, whose sums are exact in whatever order XLA takes them
    batches = [make(np.round(4 * x), np.round(4 * y).astype("f4")) for x, y in pairs([4] * 3)]
    plain = [
        jax.tree.map(lambda x: x.value if isinstance(x, Tensor) else x, batch) for batch in batches
    ]
    wanted = one_by_one(step, init(), plain)
    assert_same(step.run(init(), batches, steps_per_call=steps_per_call), wanted)


@pytest.mark.parametrize("steps_per_call", [1, 2])
@pytest.mark.parametrize("number", [3.0, 3, True, np.float64(3), np.int8(3), jnp.float32(3)])
def test_numbers_have_the_type_they_have_in_a_single_step(number, steps_per_call):
    types = []

    def loss(params, x):
        types.append(jax.typeof(x))
        return params["w"] * jnp.asarray(x, jnp.float32)

    step = ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD")
    step(start(step), number)
    step.run(start(step), [number, number], steps_per_call=steps_per_call)
    assert len(set(types)) == 1


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_batches_may_be_empty_tuples(steps_per_call):
    step = ol.optimize_loss(lambda params: 2 * params["w"], learning_rate=1.0, optimizer="SGD")
    state, _ = step.run(start(step), itertools.repeat(()), steps=3, steps_per_call=steps_per_call)
    assert state.params["w"] == 100 - 3 * 2


def test_metrics_keep_their_dtype():
    def loss(params, x):
        return params["w"] * x, ol.Aux(metrics={"half": jnp.bfloat16(1.5), "count": jnp.int8(3)})

    step = ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD")
    _, metrics = step.run(start(step), [1.0, 2.0])
    assert (metrics["half"].dtype, metrics["count"].dtype) == (jnp.bfloat16, np.int8)
    metrics["loss"][0] = 0.0  # and are the caller's own


def test_memory_may_be_used_again_by_who_made_the_batches():
    def batches(x):
        for i in range(6):
            x[:] = i
            yield x

    step = linear()
    for steps_per_call in (1, 4):
        state, metrics = step.run(
            start(step), batches(np.empty(2**16, np.float32)), steps_per_call=steps_per_call
        )
        assert state.params["w"] == 100.0 - (0 + 1 + 2 + 3 + 4 + 5)
        np.testing.assert_array_equal(metrics["global_norm/gradient_norm"], np.arange(6.0))


def test_long_runs_are_joined_on_the_way(monkeypatch):
    monkeypatch.setattr(run_module, "COMPACTED", 4)
    step, sums = linear(), []
    _, metrics = step.run(
        start(step, 0.0),
        map(float, range(23)),
        hooks=[
            ol.every(5, lambda state, seen: sums.append(seen["global_norm/gradient_norm"].tolist()))
        ],
    )
    np.testing.assert_array_equal(metrics["global_norm/gradient_norm"], np.arange(23.0))
    assert sums == [[*range(i, i + 5)] for i in range(0, 20, 5)]


@pytest.mark.parametrize("steps_per_call", [1, 2, 4, 100])
def test_hooks_are_called_after_every_n_steps(steps_per_call):
    step, seen = linear(), []

    def hook(name):
        def called(state, metrics):
            assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(metrics))
            seen.append((name, int(state.step), metrics["global_norm/gradient_norm"].tolist()))

        return called

    batches = [float(i) for i in range(1, 8)]
    hooks = [
        ol.every(np.int64(3), hook("a")),
        ol.every(2, hook("b")),
        ol.every(6, hook("c")),
        ol.every(2, hook("d"), at_end=True),
    ]
    step.run(start(step), batches, hooks=hooks, steps_per_call=steps_per_call)
    assert seen == [
        ("b", 2, [1, 2]),
        ("d", 2, [1, 2]),
        ("a", 3, [1, 2, 3]),
        ("b", 4, [3, 4]),
        ("d", 4, [3, 4]),
        ("a", 6, [4, 5, 6]),
        ("b", 6, [5, 6]),
        ("c", 6, [1, 2, 3, 4, 5, 6]),
        ("d", 6, [5, 6]),
        ("d", 7, [7]),
    ]


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_a_run_that_continues_calls_hooks_where_the_first_one_would_have(steps_per_call):
    step, seen = linear(), []
    state, _ = step.run(start(step), [1.0])
    hook = ol.every(2, lambda state, metrics: seen.append(metrics["batches"].tolist()))
    step.run(state, [1.0] * 4, hooks=[hook], steps_per_call=steps_per_call)
    assert seen == [[2], [3, 4]]


def test_hooks_go_by_batches_where_these_make_no_update():
    step, seen = linear(accumulate=4, skip="nonfinite"), []
    batches = [1.0, np.nan, 1.0, 1.0, 1.0, 1.0, np.nan]
    hook = ol.every(3, lambda state, m: seen.append((int(state.batches), int(state.step))))
    state, metrics = step.run(start(step), batches, hooks=[hook], steps_per_call=2)
    assert seen == [(3, 0), (6, 1)]
    assert (state.batches, state.step) == (7, 1)
    assert metrics["batches"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_hook_that_sets_the_batches_is_due_by_the_new_count():
    step, seen = linear(), []

    def again(state, metrics):
        seen.append(int(state.batches))
        return state.set(batches=0) if len(seen) == 1 else None

    state, _ = step.run(start(step), [1.0] * 7, hooks=[ol.every(3, again)])
    assert (seen, state.batches) == ([3, 3], 4)


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_a_hook_may_stop_the_run(steps_per_call):
    def stop(state, metrics):
        if state.batches == 4:
            raise ol.StopRun("enough")

    step, seen, batches = linear(), [], Counted([1.0] * 9)
    others = [
        ol.every(n, lambda state, metrics: seen.append(len(metrics["loss"])), at_end=end)
        for n, end in ((2, False), (3, True), (3, False))
    ]
    state, metrics = step.run(
        start(step),
        batches,
        steps=9,
        steps_per_call=steps_per_call,
        hooks=[ol.every(2, stop), *others],
    )
    assert (state.params["w"], len(metrics["loss"]), batches.pulled) == (96, 4, 4)
    assert seen == [2, 3, 3, 2, 1]  # also those of the same batch, and of the end
    state, _ = step.run(state, batches, steps=5)
    assert state.params["w"] == 91


def test_a_copy_is_not_donated():
    step, kept = linear(), []
    keep = ol.every(2, lambda state, metrics: kept.append(state.copy()))
    state, _ = step.run(start(step), [1.0] * 4, hooks=[keep])
    assert [float(old.params["w"]) for old in kept] == [98, 96]
    state, _ = step.run(kept[0], [1.0])
    assert (state.params["w"], state.batches) == (97, 3)
    assert bits(kept[1].copy()) == bits(kept[1])


def test_a_hook_may_give_another_state():
    step = linear()
    halve = lambda state, m: state.set(learning_rate=0.5 * m["learning_rate"][-1])
    move = lambda state, metrics: state.with_trees({"w": state.params["w"] + 1000.0})
    hooks = [ol.every(2, halve), ol.every(4, move)]
    state, metrics = step.run(start(step), [1.0] * 5, hooks=hooks, steps_per_call=3)
    assert metrics["learning_rate"].tolist() == [1, 1, 0.5, 0.5, 0.25]
    assert state.params["w"] == 100 - 1 - 1 - 0.5 - 0.5 + 1000 - 0.25


def test_nothing_is_traced_again_by_a_second_run():
    traced = []

    def loss(params, x):
        traced.append(x.shape)
        return jnp.mean(params["w"] * x)

    step = ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD")
    batches = [np.ones(2, np.float32)] * 7
    state, _ = step.run(start(step), batches, steps_per_call=3)
    assert len(traced) == 2  # of one step, and of three
    hooks = [ol.every(3, lambda state, metrics: None)]
    state, _ = step.run(state.set(batches=0), batches, steps_per_call=3, hooks=hooks)
    state, _ = step.run(state, batches)
    step(state, batches[0])
    assert len(traced) == 2


@pytest.mark.parametrize("steps_per_call", [1, 2, 3, 100])
def test_runs_share_an_iterator_without_losing_a_batch(steps_per_call):
    step = linear()
    batches = Counted([np.ones(n, np.float32) for n in (1, 1, 1, 2, 2, 1, 1)])
    state = start(step)
    for steps, pulled in [(2, 2), (3, 5), (2, 7)]:
        state, metrics = step.run(state, batches, steps=steps, steps_per_call=steps_per_call)
        assert metrics["loss"].shape == (steps,)
        assert batches.pulled == pulled
    assert state.params["w"] == 100 - 7


@dataclasses.dataclass
class Traffic:
    """What happens between host and device, in order."""

    events: list[str]
    in_flight: int = 0
    most: int = 0
    fetches: int = 0


@pytest.fixture
def traffic(monkeypatch):
    seen = Traffic([])
    get = run_module.fetch

    def counted_get(tree):
        seen.events.append("fetch")
        seen.fetches += 1
        seen.in_flight -= 1
        return get(tree)

    def counted(function, event):
        def call(*args):
            seen.events.append(event)
            seen.in_flight += 1
            seen.most = max(seen.most, seen.in_flight)
            return function(*args)

        return call

    monkeypatch.setattr(run_module, "fetch", counted_get)
    for name in ("__call__", "_many"):
        monkeypatch.setattr(ol.TrainStep, name, counted(getattr(ol.TrainStep, name), "call"))
    return seen


@pytest.mark.parametrize("prefetch", [1, 2, 3])
@pytest.mark.parametrize(("steps_per_call", "calls"), [(1, 20), (7, 3)])
def test_calls_in_flight_are_bounded_and_each_is_fetched_once(
    traffic, prefetch, steps_per_call, calls
):
    step = linear()
    step.run(start(step), [1.0] * 20, prefetch=prefetch, steps_per_call=steps_per_call)
    assert traffic.most == prefetch
    assert traffic.fetches == calls
    assert traffic.events[:prefetch] == ["call"] * prefetch


def test_batches_are_pulled_while_the_device_computes(traffic):
    def batches():
        for _ in range(4):
            traffic.events.append("pull")
            yield 1.0

    step = linear()
    step.run(
        start(step),
        batches(),
        prefetch=1,
        hooks=[ol.every(2, lambda *_: traffic.events.append("hook"))],
    )
    assert traffic.events == [
        *("pull", "call", "pull", "fetch", "call", "fetch", "hook"),
        *("pull", "call", "pull", "fetch", "call", "fetch", "hook"),
    ]


def test_no_batch_is_lost_where_a_hook_raises():
    def stop(state, metrics):
        raise KeyError("enough")

    step, batches = linear(), iter([float(i) for i in range(10)])
    with pytest.raises(KeyError) as caught:
        step.run(start(step), batches, hooks=[ol.every(4, stop)], steps_per_call=2)
    assert (vars(caught.value)["state"].step, next(batches)) == (4, 4.0)


def test_nothing_else_comes_back_from_the_device():
    step, state = made("state-and-key")
    with jax.transfer_guard_device_to_host("disallow"):  # what is fetched on purpose is allowed
        step.run(
            state,
            pairs([4] * 7),
            steps_per_call=3,
            hooks=[ol.every(2, lambda state, metrics: None)],
        )


def on_devices():
    """Return, by case, whether a run over devices gives the bits of single steps there."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    batches = pairs([8] * 5)
    found = {}

    def sums(params, x, y):
        found.setdefault("traced", []).append(str(x.shape))
        return squares(params, x, y)[0]

    step = ol.optimize_loss(sums, learning_rate=0.25)
    init = lambda: step.init(jax.device_put(PARAMS, whole))
    for name, sharding in {
        "one": rows,
        "each": (rows, whole),
        "list": [rows, rows],
        "partly": (rows, None),
    }.items():
        of_parts = (sharding, sharding) if name == "one" else sharding
        placed = [tuple(map(jax.device_put, batch, of_parts)) for batch in batches]
        wanted = one_by_one(step, init(), placed)
        for steps_per_call in (1, 2):
            options = {"sharding": sharding, "steps_per_call": steps_per_call}
            ran = step.run(init(), batches, **options)
            found[f"{name}-{steps_per_call}"] = [bits(ran[i]) == bits(wanted[i]) for i in (0, 1)]
            if name != "partly":
                ran = step.run(init(), placed, steps_per_call=steps_per_call)
                same = [bits(ran[i]) == bits(wanted[i]) for i in (0, 1)]
                found[f"{name}-{steps_per_call}-placed"] = same
    seen = []
    single = ol.optimize_loss(lambda p, x: jnp.mean(p["w"] * x), learning_rate=1.0)
    many = type(single)._many
    type(single)._many = lambda self, state, x: seen.append(x.sharding) or many(self, state, x)
    single.run(start(single), [np.ones(8, np.float32)] * 4, steps_per_call=2, sharding=rows)
    type(single)._many = many
    found["stacked"] = [list(sharding.spec) for sharding in seen]
    uneven = [np.ones(8, np.float32), np.ones(9, np.float32)]
    try:
        single.run(start(single), uneven, sharding=rows)
    except ValueError as error:
        found["uneven"] = int(vars(error)["state"].step)
    return json.dumps(found)


@pytest.mark.slow
def test_batches_go_to_their_devices():
    found = on_eight_devices(__name__, "on_devices")
    del found["traced"]
    assert found.pop("stacked") == [[None, "d"]] * 2
    assert found.pop("uneven") == 1
    assert set(map(tuple, found.values())) == {(True, True)}, found


def test_a_device_is_a_sharding():
    step = linear()
    state, _ = step.run(start(step), [1.0, 2.0], sharding=jax.devices()[0], steps_per_call=2)
    assert state.params["w"] == 97
