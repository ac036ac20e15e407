"""`TrainStep.explain`: what it tells is what then is made, and mistakes are named."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimize_loss as ol
from optimize_loss._engine.bucket import shown_name
from tests.cases import random_like, rows
from tests.engine.packed import OPTIMIZERS, linear, steps_of

T, S, optim = ol.transforms, ol.schedules, ol.optimizers
SHAPES = {"encoder": {"layer_0": {"bias": (2,), "kernel": (8, 2)}}, "scale": ()}
PARAMS = {
    "body": {"bias": jnp.zeros(3), "kernel": jnp.zeros((3, 2))},
    "head": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))},
    "stack": jnp.zeros((3, 2, 2)),
}


def make(**options):
    given = {"learning_rate": 0.1, "optimizer": "Adam", **options}
    return ol.optimize_loss(linear, **given)


def without_values(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def assert_told(step, params, **given):
    """Compare what is told, with values or without, with what `init` makes."""
    told = step.explain(params, **given)
    assert step.explain(without_values(params), **given) == told
    state = step.init(params, **given)
    assert told.param_bytes == nbytes(state.packed_params) == nbytes(params)
    assert told.state_bytes == nbytes(state.packed_optimizer)
    assert told.total_bytes == nbytes(state)
    assert told.parameters == sum(x.size for x in jax.tree.leaves(params))
    assert sum(row.param_bytes for row in told.rows) == told.param_bytes
    assert sum(row.state_bytes for row in told.rows) <= told.state_bytes
    places = {row.name: row.place for row in told.rows}
    shared = {shown_name(n): m for n, m in state.layout.buckets} if state.layout else {}
    assert {name: shown for name, shown in places.items() if shown} == {
        name: bucket for bucket, members in shared.items() for name in members.names
    }
    assert str(told).count("\n") >= len(told.rows) + len(told.links)
    return told


# Bytes.


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("case", rows())
def test_bytes_are_those_then_allocated_by_every_chain(case, bucketed):
    assert_told(steps_of(case.chain)[bucketed], case.random_like(SHAPES, 0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_are_those_then_allocated_by_every_optimizer(name):
    optimizer = {**vars(ol.optimizers), **ol.OPTIMIZER_CLS_NAMES}[name]
    shapes = SHAPES if name != "Muon" else {**SHAPES, "embedding": (4, 2)}
    told = assert_told(make(optimizer=optimizer), random_like(shapes, 0))
    assert all(row.learning_rate == pytest.approx(0.1) for row in told.rows)


def test_bytes_of_optax_rules_model_state_and_key():
    def loss(params, *, model_state, key):
        return linear(params, params), ol.Aux(model_state=model_state)

    rules: Any = {"head/**": {"freeze": True}, "body/**": {"optimizer": optax.adam(0.1)}}
    step = ol.optimize_loss(loss, learning_rate=None, optimizer=optax.sgd(0.1, 0.9), rules=rules)
    told = assert_told(step, PARAMS, model_state={"mean": jnp.zeros(7), "n": 0})
    rows = {row.name: row for row in told.rows}
    assert rows["body/kernel"].state_bytes == 2 * 24
    assert rows["stack"].state_bytes == 48
    assert rows["head/kernel"].state_bytes == 0
    assert (told.parameters, told.trained) == (27, 21)
    assert told.total_bytes - told.param_bytes - told.state_bytes == 2 * 4 + 8 + 28 + 4


def test_rows_tell_bytes_of_slots():
    rows = {row.name: row for row in make().explain(PARAMS).rows}
    assert rows["stack"].state_bytes == 2 * 48
    assert rows["body/bias"].state_bytes == 2 * 12
    assert (rows["stack"].shape, rows["stack"].dtype) == ((3, 2, 2), "float32")


def test_what_is_too_large_for_any_machine_is_told_too():
    """Ten terabytes of parameters, twice as many of slots."""
    huge = {"w": jax.ShapeDtypeStruct((1_600_000, 1_600_000), jnp.float32)}
    told = make().explain(huge)
    assert told.param_bytes == 4 * 1_600_000**2
    assert told.rows[0].state_bytes == 2 * told.param_bytes


def test_what_is_no_array_yet_is_told_as_init_will_make_it():
    params: Any = {"a": 1.0, "b": np.zeros(3), "n": 3, "key": jax.random.key(0)}
    step = make()
    told = step.explain(params)
    assert [row.dtype for row in told.rows][:2] == ["float32", "float32"]
    assert [row.trained for row in told.rows] == [True, True, False, False]
    assert told.total_bytes == nbytes(step.init(params))


def test_places():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, P("data", None))
    params = {**PARAMS, "stack": jax.device_put(PARAMS["stack"], split)}
    shapes = {
        **without_values(PARAMS),
        "stack": jax.ShapeDtypeStruct((3, 2, 2), jnp.float32, sharding=split),
    }
    assert make().explain(shapes) == make().explain(params)
    assert {row.place for row in make(bucket=None).explain(PARAMS).rows} == {""}
    assert {row.place for row in make().explain(PARAMS).rows} == {"bucket/float32/0"}


# Rates, decays and rules.


def test_rows_tell_rule_rate_multiplier_and_decay():
    rules = {
        "**/bias": {"weight_decay": 0},
        "stack": {"learning_rate_multiplier": [1, 0.5, 0.25], "weight_decay": 0.2},
        "body/**": {"learning_rate_multiplier": S.PiecewiseConstantDecay([5], [0.5, 1.0])},
        "head/**": {"freeze": True},
    }
    step = make(rules=rules, optimizer="AdamW", learning_rate=S.ExponentialDecay(0.1, 10, 0.5))
    rows = {row.name: row for row in step.explain(without_values(PARAMS)).rows}
    told = {n: (r.rule, r.multiplier, r.weight_decay, r.trained) for n, r in rows.items()}
    assert told == {
        "body/bias": ("**/bias", 1.0, 0.0, True),
        "body/kernel": ("body/**", 0.5, 0.004, True),
        "head/bias": ("**/bias", 1.0, 0.0, True),
        "head/kernel": ("head/**", 1.0, 0.0, False),
        "stack": ("stack", (1.0, 0.5, 0.25), 0.2, True),
    }
    assert rows["stack"].learning_rate == pytest.approx(0.1)
    assert rows["head/kernel"].learning_rate is None
    text = str(step.explain(PARAMS))
    assert "0.1 × 0.25 … 1" in text
    assert "not trained" in text
    assert "ScaleByLearningRate(learning_rate=ExponentialDecay" in text


def test_the_first_rate_is_that_of_the_first_step():
    step = make(learning_rate=S.ExponentialDecay(0.1, 10, 0.5), global_step=10)
    assert step.explain(PARAMS).rows[0].learning_rate == pytest.approx(0.05)


def test_a_rule_with_an_optimizer_has_its_rate_and_decay():
    fast = ol.optimizers.RMSprop(0.5, weight_decay=0.3)
    told = make(optimizer="AdamW", rules={"head/**": {"optimizer": fast}}).explain(PARAMS)
    rows = {row.name: row for row in told.rows}
    kernel = rows["head/kernel"]
    assert (kernel.learning_rate, kernel.weight_decay, kernel.state_bytes) == (0.5, 0.3, 32)
    assert (rows["stack"].learning_rate, rows["stack"].weight_decay) == (0.1, 0.004)
    assert {"adam", "rate", "RMSprop.rms", "RMSprop.rate"} <= {name for name, _ in told.links}


def test_the_rate_of_optax_is_not_known():
    told = make(optimizer=optax.sgd(0.1), learning_rate=None).explain(PARAMS)
    assert told.rows[0].learning_rate is None
    assert "?" in str(told).splitlines()[1]


def test_links_are_told_in_order():
    told = make(clip_gradients=2.0, gradient_noise_scale=0.5, summaries=[]).explain(PARAMS)
    assert [name for name, _ in told.links] == ["gradient_noise", "clip_gradients", "adam", "rate"]
    assert dict(told.links)["clip_gradients"] == "ClipByGlobalNorm(max_norm=2)"


def test_an_explanation_is_a_value():
    told = make().explain(PARAMS)
    assert (told, hash(told)) == (make().explain(PARAMS), hash(make().explain(PARAMS)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.__setattr__("rows", ())


# Mistakes.


def late_clip(rate):
    return T.chain(
        adam=T.ScaleByAdam(),
        decay=T.AddWeightDecay(0.1),
        rate=T.ScaleByLearningRate(rate),
        late=T.ClipByGlobalNorm(1.0),
    )


def warm(rate):
    """From 0 in ten steps, then along a cosine until step 110."""
    return S.CosineDecay(0.0, 100, warmup_target=rate, warmup_steps=10)


NARROW = {**PARAMS, "narrow": jnp.zeros((2, 2), jnp.bfloat16)}


def test_six_mistakes_give_six_warnings():
    rules = {
        "head/kernel": {"learning_rate_multiplier": 1.0},
        "body/kernel|stack": {"learning_rate_multiplier": 0.5},
    }
    step = make(optimizer=late_clip, learning_rate=warm(1e-3), rules=rules)
    told = step.explain(NARROW, steps=1000)
    named = ["'body/bias'", "0 at the first", "at step 110", "'narrow'", "'late'", "'head/kernel'"]
    assert len(told.warnings) == 6
    for name, text in zip(named, told.warnings, strict=True):
        assert name in text
    assert str(told).count("warning: ") == 6


CLEAN: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"optimizer": "AdamW", "rules": {"*/bias": {"weight_decay": 0}}},
    "clip-before": {"clip_gradients": 1.0, "gradient_noise_scale": 0.1},
    "schedule": {"learning_rate": S.CosineDecay(0.1, 1000)},
    "warm-up": {"learning_rate": S.CosineDecay(1e-4, 990, warmup_target=0.1, warmup_steps=10)},
    "staircase": {"learning_rate": S.PiecewiseConstantDecay([100, 300], [0.1, 0.01, 0.001])},
    "freeze": {"rules": {"head/**": {"freeze": True}}},
    "exempt": {"rules": {"head/**": {}, "**": {"learning_rate_multiplier": 0.5}}},
    "groups": {"rules": {"head/**": {"optimizer": "SGD", "clip_norm": 1.0}}},
    "optax": {"optimizer": optax.adamw(0.1), "learning_rate": None},
    "muon": {
        "optimizer": lambda r: ol.optimizers.Muon(r, weight_decay=None, adam_weight_decay=None)
    },
    "accumulated": {
        "optimizer": lambda r: ol.optimizers.Adam(r, gradient_accumulation_steps=4),
        "learning_rate": S.CosineDecay(0.1, 250),
    },
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_is_well_set_up_gives_no_warning(name):
    assert make(**CLEAN[name]).explain(PARAMS, steps=1000).warnings == ()


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "decay-of-biases": ({"optimizer": "AdamW"}, ("'body/bias', 'head/bias'", "weight_decay=0")),
    "decay-of-rule": ({"rules": {"*/bias": {"weight_decay": 0.1}}}, ("at most one axis", "body")),
    "first-rate-0": (
        {"learning_rate": S.CosineDecay(0.0, 990, warmup_target=0.1, warmup_steps=10)},
        ("'rate'", "0 at the first step"),
    ),
    "early-end": (
        {"learning_rate": S.CosineDecay(0.1, 500)},
        ("ends at step 500", "last step is 999", "stays at 0"),
    ),
    "early-linear-end": (
        {"learning_rate": S.PolynomialDecay(0.1, 300, 0.01)},
        ("ends at step 300", "stays at 0.01"),
    ),
    "early-end-of-updates": (
        {"optimizer": lambda r: ol.optimizers.Adam(r, gradient_accumulation_steps=2)}
        | {"learning_rate": S.CosineDecay(0.1, 400)},
        ("ends at step 400", "last step is 499"),
    ),
    "late-clip": (
        {
            "optimizer": T.chain(
                adam=T.ScaleByAdam(), c=T.ClipByValue(1.0), r=T.ScaleByLearningRate(0.1)
            ),
            "learning_rate": None,
        },
        ("'c'", "'adam'"),
    ),
    "one": (
        {"rules": {"head/**": {"learning_rate_multiplier": 1}}},
        ("rules['head/**']['learning_rate_multiplier']", "'head/bias'"),
    ),
    "ones": ({"rules": {"stack": {"learning_rate_multiplier": [1, 1, 1]}}}, ("rules['stack']",)),
    "empty": ({"rules": {"head/**": {}}}, ("rules['head/**']", "empty")),
    "not-frozen": ({"rules": {"head/**": {"freeze": False}}}, ("rules['head/**']['freeze']",)),
    "decay-of-frozen": (
        {"rules": {"head/**": {"freeze": True, "weight_decay": 0.1}}},
        ("rules['head/**']['weight_decay']", "'head/kernel'"),
    ),
    "clip-of-what-is-no-variable": (
        {"variables": ["body/*"], "rules": {"head/**": {"clip_norm": 0.1}}},
        ("rules['head/**']['clip_norm']",),
    ),
    "no-decay-to-replace": (
        {"rules": {"head/**": {"weight_decay": 0}}},
        ("rules['head/**']['weight_decay']",),
    ),
    "no-noise-to-replace": (
        {"rules": {"head/**": {"noise_scale": 0}}},
        ("rules['head/**']['noise_scale']",),
    ),
    "gradient-multiplier": (
        {"gradient_multipliers": {"head/*": 1.0}},
        ("`gradient_multipliers`", "'head/*'"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_warning_that_names_it(name):
    options, says = MISTAKES[name]
    (warning,) = make(**options).explain(PARAMS, steps=1000).warnings
    for text in says:
        assert text in warning


@pytest.mark.parametrize(("rate", "dtype", "warned"), [
    (1e-3, jnp.bfloat16, True),
    (1e-1, jnp.bfloat16, False),
    (1e-4, jnp.float16, True),
    (1e-3, jnp.float16, False),
    (1e-6, jnp.float32, False),
])  # fmt: skip
def test_narrow_parameters_at_a_small_rate_are_warned_about(rate, dtype, warned):
    """The bound is half of the precision: 2⁻⁸ of bfloat16, 2⁻¹¹ of float16."""
    told = make(learning_rate=rate).explain({"w": jnp.zeros((2, 2), dtype)})
    assert len(told.warnings) == warned


STILL: dict[str, tuple[Any, list[str]]] = {
    "adam": (optim.Adam(1e-3), ["b", "w"]),
    "adam-moves": (optim.Adam(1e-2), []),
    "sgd": (optim.SGD(1e-3), ["b", "w"]),
    "sgd-moves": (optim.SGD(1e-2), []),
    "sgd-gathers-momentum": (optim.SGD(1e-3, momentum=0.9), []),
    "adadelta": (optim.Adadelta(0.01), ["b", "w"]),
    "adadelta-moves": (optim.Adadelta(100.0), []),
    "muon": (optim.Muon(0.01), ["w"]),  # of a root mean square of 0.2 rates
    "muon-moves": (optim.Muon(0.1), []),
    "lamb": (optim.Lamb(1e-3), ["b", "w"]),
    "adafactor": (optim.Adafactor(1e-3), ["b", "w"]),
    "ftrl-keeps-sums": (optim.Ftrl(1e-2), []),
    "schedule-free-keeps-means": (optim.ScheduleFreeAdamW(3e-3, warmup_steps=0), []),
}


@pytest.mark.parametrize("name", STILL)
def test_narrow_parameters_are_warned_about_by_what_their_rule_does(name):
    """At a size of 1.5, what is less than 2⁻⁸ is lost of a bfloat16."""
    rule, wanted = STILL[name]
    told = make(optimizer=rule, learning_rate=None).explain(
        {"w": jnp.zeros((8, 8), jnp.bfloat16), "b": jnp.zeros(8, jnp.bfloat16)}
    )
    found = [text for text in told.warnings if "may stand still" in text]
    assert [n for n in ("b", "w") if any(f"'{n}'" in text for text in found)] == wanted


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_what_is_rounded_stochastically_does_not_stand_still(dtype):
    params = {"w": jnp.zeros((8, 8), dtype)}
    assert make(learning_rate=1e-4).explain(params).warnings
    assert make(learning_rate=1e-4, precision="bfloat16").explain(params).warnings == ()
    nearest = ol.Precision("bfloat16", params="nearest")
    assert make(learning_rate=1e-4, precision=nearest).explain(params).warnings


def test_rows_tell_which_rule_moves_a_parameter():
    rules = {"head/**": {"optimizer": optim.SGD(0.1)}, "body/bias": {"freeze": True}}
    told = make(optimizer=optim.Muon(0.1), learning_rate=None, rules=rules, ema=0.9).explain(PARAMS)
    assert {row.name: row.moved_by for row in told.rows} == {
        "body/bias": (),
        "body/kernel": ("muon",),
        "head/bias": ("SGD.momentum",),
        "head/kernel": ("SGD.momentum",),
        "stack": ("adam",),
    }
    heads, *rest = str(told).splitlines()
    at = heads.index("moved by")
    assert [line[at:].split()[0] for line in rest[1:5]] == ["muon", *["SGD.momentum"] * 2, "adam"]


# Parameters by shape, those of them that are Muon's, and those that are warned about.
STACKS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "no-stack": ({"a/kernel": (4, 3), "a/bias": (3,)}, ["a/kernel"], []),
    "stack": (
        {"blocks/bias": (3, 8), "blocks/kernel": (3, 8, 8), "blocks/scale": (3, 8)},
        [],
        ["blocks/kernel"],
    ),
    "beside-a-matrix": (
        {"blocks/bias": (3, 8), "blocks/kernel": (3, 8, 8), "head/kernel": (8, 3)},
        ["head/kernel"],
        ["blocks/kernel"],
    ),
    "in-modules": (
        {"net/blocks/a/kernel": (3, 8, 8), "net/blocks/norm/scale": (3, 8), "net/out": (3, 4)}
        | {"net/in/kernel": (4, 8)},
        ["net/in/kernel", "net/out"],
        ["net/blocks/a/kernel"],
    ),
    "convolution": (
        {"conv/bias": (8,), "conv/kernel": (3, 3, 2, 8), "dense/kernel": (3, 8)},
        ["dense/kernel"],
        [],
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_what_is_stacked_is_no_matrix(name):
    shapes, muons, warned = STACKS[name]
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        *parts, last = path.split("/")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = jnp.zeros(shape)
    rule = optim.Muon(0.1, weight_decay=None, adam_weight_decay=None)
    told = make(optimizer=rule, learning_rate=None).explain(tree)
    assert [row.name for row in told.rows if row.moved_by == ("muon",)] == sorted(muons)
    assert [text.count("Muon leaves stacked matrices") for text in told.warnings] == [1] * bool(
        warned
    )
    assert all(f"'{name}'" in text for name in warned for text in told.warnings)


def test_without_a_number_of_steps_no_schedule_ends_too_early():
    assert make(learning_rate=S.CosineDecay(0.1, 5)).explain(PARAMS).warnings == ()


# Work, and errors.


def test_the_work_at_a_thousand_leaves_is_that_of_one_init():
    """One `init` on shapes: it asks each link for its slots once a parameter, and never traces."""
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Counting(T.Link):
        def slots(self, param):
            calls.append(param)
            return {"m": jnp.zeros_like(param)}

        def leaf(self, update, slots, param, k):
            raise AssertionError("a step was traced")

    chain = T.chain(counting=Counting(), rate=T.ScaleByLearningRate(0.1))
    shapes = {f"w{i}": jax.ShapeDtypeStruct((i + 1, 2), jnp.float32) for i in range(1000)}
    rules = {"w*5": {"weight_decay": 0.1}, "w1*": {"learning_rate_multiplier": 0.5}}
    step = make(optimizer=chain, learning_rate=None, rules=rules)
    assert len(step.explain(shapes, steps=1000).rows) == 1000
    assert len(calls) == 1000


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "leaf": ({"w": "text"}, {}, ol.InvalidType, ("'w'", "'text'")),
    "steps": (PARAMS, {"steps": 0}, ValueError, ("`steps`", "at least 1")),
    "steps-kind": (PARAMS, {"steps": 1.5}, ol.InvalidType, ("`steps`", "1.5")),
    "rule": ({"w": jnp.zeros(2)}, {}, ValueError, ("'head/**'", "'w'")),
    "nothing": ({"head": {"n": 1}}, {}, ValueError, ("no parameter",)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_init_refuses_is_refused(name):
    params, given, error, says = BAD[name]
    step = make(rules={"head/**": {"weight_decay": 0.1}})
    with pytest.raises(error) as caught:
        step.explain(params, **given)
    for text in says:
        assert text in str(caught.value)


def test_a_tree_of_another_library_has_its_names():
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=[])
    @dataclasses.dataclass
    class Model:
        w: Any

    assert make().explain([Model(jnp.zeros((2, 2)))]).rows[0].name == "0/w"
