"""What holds for every link and every chain: each law runs over each row of `cases.py`."""

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import pickle
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optimize_loss import transforms
from optimize_loss._names import leaf_names
from tests.cases import (
    CASES,
    LOSS,
    NAMES,
    SHAPES,
    SMALL_SHAPES,
    grads,
    on_eight_devices,
    params,
    random_like,
    rows,
)

DTYPES = ("float32", "bfloat16", "float16")
PAIRS = list(itertools.product(DTYPES, DTYPES))

law = pytest.mark.parametrize("case", rows())


def law_where(capability):
    return pytest.mark.parametrize("case", rows(capability))


TRACES = collections.Counter()


@functools.cache
def step_of(tx):
    """Return the jitted step of a chain, shared by all laws: only for trees like its case's."""

    def step(params, state, grads):
        TRACES[tx] += 1
        return tx.apply(grads, state, params, value=LOSS)

    return jax.jit(step)


LOWERED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: LOWERED.append(event) if "jaxpr_to_mlir" in event else None
)


@contextlib.contextmanager
def nothing_compiles():
    before = len(LOWERED)
    yield
    assert len(LOWERED) == before, "a program was compiled again"


def run(case, state, steps):
    """Return parameters and state after some steps in a Python loop."""
    p = case.params()
    for t in range(steps):
        p, state = step_of(case.chain)(p, state, case.grads(t))
    return p, state


def avals(tree):
    """Return the structure of a tree, and shape, dtype and weak type of its leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def assert_close(got, want, relative=1e-6):
    """Compare leaf by leaf, relative to the largest entry of the leaf.

    Not bit by bit: XLA contracts a * b + c into one rounding where it fuses the two, and what it
    fuses differs from program to program.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, a, b in zip(leaf_names(want), *map(jax.tree.leaves, (got, want)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        size = np.max(np.abs(b.astype(np.complex128)), initial=0)
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * size, err_msg=name)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_finite(tree):
    for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        assert np.isfinite(np.asarray(x, np.complex128)).all(), name


def stacked(*trees):
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)


def set_all(case, state):
    return case.chain.set(state, **{name: second for name, (_, second) in case.numbers.items()})


# The table itself.


def test_every_link_has_a_row():
    exported = {x for x in vars(transforms).values() if isinstance(x, type)}
    wanted = {x for x in exported if hasattr(x, "init") or issubclass(x, transforms.Link)}
    covered = {type(link) for case in CASES for _, link in case.chain.links}
    kinds = {transforms.Link, transforms.TreeLink, transforms.Gate, transforms.Chain}
    assert wanted - kinds <= covered


@law_where("numbers")
def test_row_gives_every_number_a_second_value(case):
    for name, (first, second) in case.numbers.items():
        assert first != second, name


# A transformation is a value.


@law
def test_repr_contains_the_fields(case):
    for name, link in case.chain.links:
        assert repr(name) in repr(case.chain)
        for field in dataclasses.fields(link) if dataclasses.is_dataclass(link) else ():
            assert f"{field.name}={getattr(link, field.name)!r}" in repr(case.chain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tx: pickle.loads(pickle.dumps(tx))])
@law_where("is_value")
def test_equals_its_copies(case, copied):
    twin = copied(case.chain)
    assert twin == case.chain
    assert hash(twin) == hash(case.chain)
    assert repr(twin) == repr(case.chain)
    assert (case.other == case.chain) == (not case.numbers)


# Names.


@law
def test_state_is_keyed_by_link_then_slot_then_parameter(case):
    state = jax.eval_shape(case.chain.init, case.params())
    wanted = {"step"}
    for name, link in case.chain.links:
        if isinstance(link, transforms.Link) and not isinstance(link, transforms.TreeLink):
            slots = jax.eval_shape(link.slots, case.params()["scale"])
            wanted |= {f"{name}/{key}" for key in {**link.numbers(), **link.memory()}}
            wanted |= {f"{name}/{slot}/{param}" for slot in slots for param in NAMES}
        else:
            wanted |= {f"{name}/{key}" for key in leaf_names(state[name])}
    assert set(leaf_names(jax.eval_shape(case.chain.decoded, state, case.params()))) == wanted


def test_names_of_adam():
    state = jax.eval_shape(transforms.chain(adam=transforms.ScaleByAdam()).init, params())
    assert "adam/m/encoder/layer_0/kernel" in leaf_names(state)


@law
def test_inserting_a_link_renames_nothing(case):
    longer = transforms.chain(before=transforms.ObserveNorms(), **dict(case.chain.links))
    longer = dataclasses.replace(longer, precision=case.chain.precision)
    was, now = (jax.eval_shape(tx.init, case.params()) for tx in (case.chain, longer))
    added = {name for name in leaf_names(now) if name.startswith("before/")}
    assert set(leaf_names(was)) == set(leaf_names(now)) - added
    assert avals({**now, **was}) == avals(now)


# Dtypes.


@pytest.mark.parametrize(("param_dtype", "grad_dtype"), PAIRS)
@law
def test_avals_do_not_change(case, param_dtype, grad_dtype):
    p, g = case.random_like(SHAPES, 0, param_dtype), case.random_like(SHAPES, 1, grad_dtype)
    state = jax.eval_shape(case.chain.init, p)
    updates, new = jax.eval_shape(functools.partial(case.chain.update, value=LOSS), g, state, p)
    assert avals(new) == avals(state)
    assert avals(updates) == avals(jax.eval_shape(lambda: p))
    assert not any(x.weak_type for x in jax.tree.leaves((state, updates)))


@law
def test_every_dtype_stays_finite(case):
    """Run three steps on a tree with a parameter for every pair of dtypes, and a complex one."""

    def tree(seed, which):
        pairs = {
            f"{a}-{b}": case.random_like({"bias": (3,)}, seed, (a, b)[which]) for a, b in PAIRS
        }
        pairs |= jax.tree.map(jnp.ones_like, case.random_like({"scale": ()}, seed))
        phase = {"phase": case.random_like((3,), seed, "complex64")}
        return pairs | phase if case.complex_ok else pairs

    p = tree(0, which=0)
    state = case.chain.init(p)
    before = avals((p, state))
    step = jax.jit(lambda p, state, g: case.chain.apply(g, state, p, value=LOSS))
    for t in range(3):
        p, state = step(p, state, tree(1 + t, which=1))
    assert avals((p, state)) == before
    assert_finite((p, state))


def program_in_x64_mode(case, dtype):
    """Return the state's avals, and the update's program as text."""
    with jax.enable_x64(True):
        p, g = case.random_like(SHAPES, 0, dtype), case.random_like(SHAPES, 1, dtype)
        state = jax.eval_shape(case.chain.init, p)
        update = functools.partial(case.chain.update, value=LOSS.astype(dtype))
        jaxpr, (updates, new) = jax.make_jaxpr(update, return_shape=True)(g, state, p)
        assert avals(new) == avals(state)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    return state, str(jaxpr)


@law
def test_float32_stays_float32_in_x64_mode(case):
    state, program = program_in_x64_mode(case, "float32")
    assert avals(state) == avals(jax.eval_shape(case.chain.init, case.params()))
    assert "f64[2" not in program  # no array; Python's numbers are float64 scalars
    assert "f64[8" not in program


@law_where("all_float64")
def test_float64_is_computed_in_float64(case):
    state, program = program_in_x64_mode(case, "float64")
    assert jnp.float32 not in {x.dtype for x in jax.tree.leaves(state)}
    assert "f32[" not in program


def test_float64_is_accurate():
    """Adam's first step is g / (|g| + ε/√(1 - β₂)), to float64's precision."""
    tx = transforms.chain(adam=transforms.ScaleByAdam(0.9, 0.999, 1e-3))
    with jax.enable_x64(True):
        g = random_like((5,), 0, "float64")
        updates, _ = tx.update(g, tx.init(g), g)
        g = np.asarray(g)
        assert_close(updates, g / (np.abs(g) + 1e-3 / np.sqrt(1 - 0.999)), 1e-12)


# One program.


@law
def test_jit_equals_eager(case):
    p, state = case.params(), case.chain.init(case.params())
    for t in range(2):
        p, state = case.chain.apply(case.grads(t), state, p, value=LOSS)
    assert_close(run(case, case.chain.init(case.params()), steps=2), (p, state))


@law
def test_update_and_apply_agree(case):
    p, state = case.params(), case.chain.init(case.params())
    updates, after = jax.jit(case.chain.update)(case.grads(0), state, p, value=LOSS)
    assert_close((optax.apply_updates(p, updates), after), run(case, state, steps=1))


@law
def test_traces_once(case):
    p, state = run(case, case.chain.init(case.params()), steps=1)
    with nothing_compiles():
        for t in range(1, 5):
            p, state = step_of(case.chain)(p, state, case.grads(t))
    assert TRACES[case.chain] == 1


@law
def test_scan_under_vmap_equals_separate_loops(case):
    """Over states that differ in every hyperparameter, and over gradients."""
    states = case.chain.init(case.params()), set_all(case, case.chain.init(case.params()))

    def body(carry, g):
        p, state = carry
        return case.chain.apply(g, state, p, value=LOSS), None

    @jax.jit
    @jax.vmap
    def runs(p, state, every):
        return jax.lax.scan(body, (p, state), every)[0]

    every = stacked(*map(case.grads, range(3)))
    got = runs(stacked(case.params(), case.params()), stacked(*states), stacked(every, every))
    assert_close(got, stacked(*(run(case, state, steps=3) for state in states)))


# Numbers are state.


def lowered(case, tx, state):
    update = functools.partial(tx.update, value=LOSS)
    return jax.jit(update).lower(case.grads(0), state, case.params()).as_text()


@law_where("numbers")
def test_numbers_are_not_in_the_program(case):
    text = lowered(case, case.chain, case.chain.init(case.params()))
    assert lowered(case, case.other, case.other.init(case.params())) == text
    assert lowered(case, case.chain, set_all(case, case.chain.init(case.params()))) == text


@law_where("numbers")
def test_setting_all_numbers_equals_building_with_them(case):
    state, wanted = set_all(case, case.chain.init(case.params())), case.other.init(case.params())
    for name in case.numbers:
        link, number = name.split("/", 1)
        assert_same(state[link][number], wanted[link][number])
        assert avals(state[link][number]) == avals(wanted[link][number])


REALS = (float, np.float64, np.float32, np.array, jnp.float32, jnp.bfloat16, jnp.array)
COUNTS = (int, np.int64, np.uint32, np.array, jnp.int32, jnp.uint32, jnp.array)


def changes(case):
    """Yield every number with every kind of scalar, and what the state is to hold then."""
    for name, values in case.numbers.items():
        link, number = name.split("/", 1)
        rule = case.chain.link(link).rule(number)
        whole = rule.kind in ("count", "seed")
        given = [kind(x) for x in values for kind in (COUNTS if whole else REALS)]
        given += [] if whole else [0, 1, -1, np.int32(0), jnp.int32(1)]
        for value in given:
            x = int(value) if whole else float(value)
            if not rule.holds(x):  # as for 0.999 in bfloat16, which is 1
                continue
            stored = np.array([x, 1 - x] if rule.kind == "decay" else x)
            dtype = {"count": np.int32, "seed": np.uint32}.get(rule.kind, np.float32)
            yield name, value, stored.astype(dtype)


@law_where("numbers")
def test_a_hundred_changes_compile_nothing(case):
    step, state = step_of(case.chain), case.chain.init(case.params())
    p, g, every = case.params(), case.grads(0), list(changes(case))
    _, state = step(p, state, g)
    with nothing_compiles():
        for name, value, stored in itertools.islice(itertools.cycle(every), 100):
            link, number = name.split("/", 1)
            _, state = step(p, case.chain.set(state, **{name: value}), g)
            np.testing.assert_array_equal(state[link][number], stored, err_msg=f"{name}={value!r}")
            assert state[link][number].dtype == stored.dtype
    assert TRACES[case.chain] == 1


def test_none_gives_back_the_schedule():
    (case,) = (case for case in CASES if case.name == "chain-schedules")
    state, g = case.chain.init(case.params()), case.grads(0)
    follows, _ = step_of(case.chain)(case.params(), state, g)
    halted = case.chain.set(state, learning_rate=0.0, decay=0.5)
    stands, _ = step_of(case.chain)(case.params(), halted, g)
    again, _ = step_of(case.chain)(
        case.params(), case.chain.set(halted, learning_rate=None, decay=None), g
    )
    assert_same(stands, case.params())
    assert_same(again, follows)
    assert not np.array_equal(follows["scale"], stands["scale"])
    assert TRACES[case.chain] == 1


# Edges.


@law_where("smooth_at_zero")
def test_derivatives_at_zero_are_finite(case):
    """With respect to the gradients, and to the numbers in the state that are real."""
    p = case.random_like(SMALL_SHAPES, 0)
    state = case.chain.init(p)
    numbers = {
        tuple(name.split("/", 1)): value
        for name, value in zip(leaf_names(state), jax.tree.leaves(state), strict=True)
        if name in case.numbers and jnp.issubdtype(value.dtype, jnp.floating)
    }

    def size(g, numbers, state):
        for (link, number), value in numbers.items():
            state = {**state, link: {**state[link], number: value}}
        updates, _ = case.chain.update(g, state, p, value=LOSS)
        return optax.tree.norm(updates, squared=True)

    zeros = jax.tree.map(jnp.zeros_like, p)
    by_gradient, by_number = jax.jit(jax.grad(size, argnums=(0, 1)))(zeros, numbers, state)
    assert_finite(by_gradient)
    assert_finite(list(by_number.values()))


def step_without_kernel(case):
    """Return what comes before and after a step in which the kernel has no gradient."""
    before = run(case, case.chain.init(case.params()), steps=1)
    g = case.grads(1)
    g["encoder"]["layer_0"]["kernel"] = None
    return before, jax.jit(lambda p, s: case.chain.apply(g, s, p, value=LOSS))(*before)


@law
def test_gradient_of_none_leaves_the_parameter_alone(case):
    (p, state), (new, after) = step_without_kernel(case)
    assert_same(new["encoder"]["layer_0"]["kernel"], p["encoder"]["layer_0"]["kernel"])
    assert avals((new, after)) == avals((p, state))
    assert_finite((new, after))


@law_where("keeps_slots")
def test_gradient_of_none_leaves_slots_alone(case):
    (_, state), (_, after) = step_without_kernel(case)
    was, now = (dict(zip(leaf_names(s), jax.tree.leaves(s), strict=True)) for s in (state, after))
    for name in was:
        if name.endswith("/encoder/layer_0/kernel"):
            assert_same(now[name], was[name])


@law
def test_update_of_none_is_none(case):
    state = jax.eval_shape(case.chain.init, case.params())
    g = case.grads(0)
    g["encoder"]["layer_0"]["kernel"] = None
    update = functools.partial(case.chain.update, value=LOSS)
    updates, _ = jax.eval_shape(update, g, state, case.params())
    assert avals(updates) == avals(jax.eval_shape(lambda: g))


INTEGER_GRADS = {
    "float0": np.zeros((2,), jax.dtypes.float0),
    "int32": np.ones((2,), np.int32),
    "None": None,
}


@pytest.mark.parametrize("grad", INTEGER_GRADS.values(), ids=INTEGER_GRADS)
@law_where("integers_ok")
def test_integer_parameter_is_left_alone(case, grad):
    p = {**case.params(), "table": jnp.array([3, 4])}
    state = case.chain.init(p)
    new, after = case.chain.apply({**case.grads(0), "table": grad}, state, p, value=LOSS)
    assert_same(new["table"], jnp.array([3, 4]))
    assert avals((new, after)) == avals((p, state))
    without, _ = run(case, case.chain.init(case.params()), steps=1)
    assert_close({k: new[k] for k in without}, without)


@law_where("empty_ok")
def test_empty_tree(case):
    state = case.chain.init({})
    new, after = case.chain.apply({}, state, {}, value=LOSS)
    assert new == {}
    assert avals(after) == avals(state)
    assert after["step"] == 1
    assert_finite(after)


@law
def test_leaf_without_entries(case):
    p = {**case.params(), "none": jnp.zeros((0, 3))}
    state = case.chain.init(p)
    new, after = case.chain.apply({**case.grads(0), "none": p["none"]}, state, p, value=LOSS)
    assert avals((new, after)) == avals((p, state))
    assert_finite((new, after))


@law
def test_tree_of_one_array(case):
    """A leaf of one entry that is the whole tree; where a pattern wants a name, in a dict."""
    bare = jnp.full_like(case.random_like((), 0), 2.0)
    p = bare if case.empty_ok else {"scale": bare, "layer": {"bias": bare}}
    state = case.chain.init(p)
    new, after = case.chain.apply(p, state, p, value=LOSS)
    assert avals((new, after)) == avals((p, state))
    assert_finite((new, after))


# Complex numbers.


def total_norm(g):
    return np.sqrt(np.sum(np.abs(g) ** 2))


# The first step on one leaf by numpy: |z|² wherever the rule for real numbers has a square.
ORACLES = {
    "clip-value": lambda g: g * np.minimum(1, 0.3 / np.abs(g)),
    "clip-norm": lambda g: g * np.minimum(1, 0.5 / total_norm(g)),
    "clip-global-norm": lambda g: g * np.minimum(1, 0.5 / total_norm(g)),
    "adagrad": lambda g: g / np.sqrt(0.1 + np.abs(g) ** 2 + 1e-7),
    "rms": lambda g: g / np.sqrt(0.1 * np.abs(g) ** 2 + 1e-7),
    "rms-centered": lambda g: g / np.sqrt(0.1 * np.abs(g) ** 2 - np.abs(0.1 * g) ** 2 + 1e-4),
    "adadelta": lambda g: g * np.sqrt(1e-6) / np.sqrt(0.05 * np.abs(g) ** 2 + 1e-6),
    "adam": lambda g: g / (np.abs(g) + 1e-8 / np.sqrt(0.001)),
    "amsgrad": lambda g: g / (np.abs(g) + 1e-8 / np.sqrt(0.001)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_complex_squares_are_those_of_the_absolute_value(name):
    tx = next(case.chain for case in CASES if case.name == name)
    g = random_like((3, 2), 5, "complex64")
    updates, _ = tx.update({"w": g}, tx.init({"w": g}), {"w": g})
    assert_close(updates["w"], np.complex64(ORACLES[name](np.asarray(g))), 1e-5)


def test_complex_norms():
    """One complex and one real parameter, of norms √(1 + 4 + 4) = 3 and 4."""
    tx = transforms.chain(all=transforms.ObserveNorm(), each=transforms.ObserveNorms())
    g = {"a": jnp.array([1 + 2j, -2j]), "b": jnp.array([4.0])}
    _, state = tx.update(g, tx.init(g), g)
    assert_close(state["all"]["norm"], np.float32(5))
    assert_close(state["each"]["norm"], {"a": np.float32(3), "b": np.float32(4)})


# Many devices.


def sharded(p, axis_type):
    """Return parameters with the kernel split over eight devices, and the sharding of each."""
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), p)
    shardings["encoder"]["layer_0"]["kernel"] = NamedSharding(mesh, P("data"))
    return jax.device_put(p, shardings), shardings


def partition(x):
    """Return the axes of the mesh over which an array, or the type of one, is split."""
    return [axis for axis in getattr(x.sharding, "spec", ()) if axis]


def on_a_mesh(case):
    """Three steps are those of one device, and everything stays as it is split."""
    p, shardings = sharded(case.params(), AxisType.Auto)
    state = case.chain.init(p)
    before = jax.tree.map(partition, (p, state))
    step = jax.jit(lambda p, state, g: case.chain.apply(g, state, p, value=LOSS))
    for t in range(3):
        p, state = step(p, state, jax.device_put(case.grads(t), shardings))
    assert jax.tree.map(partition, (p, state)) == before
    assert_close((p, state), run(case, case.chain.init(case.params()), steps=3), 5e-6)


def with_shardings_in_types(case):
    """Parameters and slots stay as they are split, by the types, which say so."""
    p, shardings = sharded(case.params(), AxisType.Explicit)
    state = case.chain.init(p)
    apply = functools.partial(case.chain.apply, value=LOSS)
    new = jax.eval_shape(apply, jax.device_put(case.grads(0), shardings), state, p)
    assert jax.tree.map(partition, new) == jax.tree.map(partition, (p, state))


def in_shard_map(case):
    """With one gradient on each device, a step with their mean is that of one device."""
    every = stacked(*map(case.grads, range(8)))

    def step(p, state, g):
        g = jax.tree.map(lambda x: jax.lax.pmean(x[0], "data"), g)
        return case.chain.apply(g, state, p, value=LOSS)

    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    first = case.params(), case.chain.init(case.params())
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), every)
    assert_close(jax.jit(mapped)(*first, every), step_of(case.chain)(*first, mean), 5e-6)


def compiles_once(placement):
    """With parameters put somewhere, as from a file, only the first step is compiled."""
    tx = transforms.chain(clip=transforms.ClipByGlobalNorm(1.0), adam=transforms.ScaleByAdam())
    p = jax.device_put(params(), placement)
    state, step = tx.init(p), jax.jit(tx.apply)
    every = [jax.device_put(grads(t), placement) for t in range(3)]
    p, state = step(every[0], state, p)
    with nothing_compiles():
        for g in every[1:]:
            p, state = step(g, state, p)


def test_on_one_device_only_the_first_step_is_compiled():
    compiles_once(jax.devices()[0])


MANY_DEVICES = {"mesh": on_a_mesh, "explicit": with_shardings_in_types, "shard_map": in_shard_map}


def report_on_many_devices():
    """Return as JSON what went wrong, by way and case; "" where nothing did."""
    calls: dict[str, Any] = {
        f"{way}/{case.name}": functools.partial(function, case)
        for (way, function), case in itertools.product(MANY_DEVICES.items(), CASES)
    }
    calls["compiles-once"] = lambda: compiles_once(sharded(params(), AxisType.Auto)[1])
    report = {}
    for name, call in calls.items():
        try:
            call()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
    return json.dumps(report)


@pytest.fixture(scope="module")
def report():
    return on_eight_devices(__name__, "report_on_many_devices")


@pytest.mark.parametrize("way", MANY_DEVICES)
@law
def test_eight_devices_equal_one(case, way, report):
    assert not report[f"{way}/{case.name}"], report[f"{way}/{case.name}"]


def test_on_eight_devices_only_the_first_step_is_compiled(report):
    assert not report["compiles-once"], report["compiles-once"]
