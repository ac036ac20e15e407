"""What holds for every link and every chain: each law runs over each row of `cases.py`."""

import copy
import dataclasses
import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optimize_loss import transforms
from optimize_loss._names import leaf_names
from tests.cases import (
    CASES,
    LOSS,
    NAMES,
    SHAPES,
    params,
    random_like,
)
from tests.links.law import (
    TRACES,
    assert_close,
    assert_finite,
    assert_same,
    avals,
    law,
    law_where,
    nothing_compiles,
    run,
    stacked,
    step_of,
)

DTYPES = ("float32", "bfloat16", "float16")
PAIRS = list(itertools.product(DTYPES, DTYPES))


def set_all(case, state):
    return case.chain.set(state, **{name: second for name, (_, second) in case.numbers.items()})


# The table itself.


def test_every_link_has_a_row():
    exported = {x for x in vars(transforms).values() if isinstance(x, type)}
    wanted = {x for x in exported if hasattr(x, "init") or issubclass(x, transforms.Link)}
    covered = {type(link) for case in CASES for _, link in case.chain.links}
    kinds = (transforms.Link, transforms.TreeLink, transforms.Gate, transforms.Averaging)
    assert wanted - {*kinds, transforms.Chain} <= covered


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


@functools.cache
def shapes_of(case, dtype):
    """Return parameters of a dtype, and the state for them, as shapes."""
    p = jax.eval_shape(lambda: case.random_like(SHAPES, 0, dtype))
    return p, jax.eval_shape(case.chain.init, p)


@pytest.mark.parametrize(("param_dtype", "grad_dtype"), PAIRS)
@law
def test_avals_do_not_change(case, param_dtype, grad_dtype):
    p, state = shapes_of(case, param_dtype)
    g, _ = shapes_of(case, grad_dtype)
    updates, new = jax.eval_shape(functools.partial(case.chain.update, value=LOSS), g, state, p)
    assert avals(new) == avals(state)
    assert avals(updates) == avals(p)
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


@pytest.mark.slow
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
