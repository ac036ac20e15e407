"""Rules by pattern: equal to what one would write by hand, and never without effect."""

import dataclasses
import pickle
import re
from typing import Any

import equinox
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import optimize_loss as ol
from optimize_loss._names import leaf_names
from tests.cases import random_like
from tests.engine.packed import assert_alike, linear

T = ol.transforms
SHAPES = {
    "body": {"bias": (3,), "kernel": (3, 2)},
    "head": {"bias": (2,), "kernel": (2, 2)},
    "stack": {"w": (3, 2, 2)},
}
PARAMS = random_like(SHAPES, 0)
BATCHES = [random_like(SHAPES, t) for t in (1, 2, 3)]


@pytest.fixture
def as_optax_expects():
    """optax multiplies integers by floats, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make(rules, bucket: Any = "auto", loss: Any = linear, **options):
    given = {"learning_rate": 0.1, "optimizer": "AdamW", **options}
    return ol.optimize_loss(loss, rules=rules, bucket=bucket, **given)


def trained(step, params=PARAMS, batches=BATCHES, **values):
    state = step.init(params).set(**values)
    for batch in batches:
        state, _ = step(state, batch)
    return state


def by_hand(rule_of, params=PARAMS, batches=BATCHES, rate=0.1, own_decay=0.004):
    """Adam with decoupled decay, leaf by leaf: `rule_of(name)` gives (multiplier, decay)."""
    leaves, treedef = jax.tree.flatten(params)
    new = []
    for j, (name, p) in enumerate(zip(leaf_names(params), leaves, strict=True)):
        multiplier, decay = rule_of(name)
        decay = own_decay if decay is None else decay
        p, m, v = np.asarray(p, np.float64), 0.0, 0.0
        for t, batch in enumerate(batches, 1):
            g = np.asarray(jax.tree.leaves(batch)[j], np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            u = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m
            p = p - multiplier * rate * (u / (np.sqrt(v) + 1e-7) + decay * p)
        new.append(p)
    return jax.tree.unflatten(treedef, new)


def assert_close(got, want, rtol=2e-6):
    for name, a, b in zip(leaf_names(want), *map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6, err_msg=name)


# Every kind of rule does what one would write by hand, with small parameters in one array or not.


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_multipliers_and_decays_are_those_written_by_hand(bucket):
    rules = {
        "head/bias": {"learning_rate_multiplier": 0.5, "weight_decay": 0.3},
        "**/bias": {"weight_decay": 0.0},
        "head/**": {"learning_rate_multiplier": 3.0},
    }
    hand = {"head/bias": (0.5, 0.3), "body/bias": (1.0, 0.0), "head/kernel": (3.0, None)}
    got = trained(make(rules, bucket, optimizer=ol.optimizers.AdamW)).params
    # In float32, 1 - 0.999 has an error of 5e-5 of itself.
    assert_close(got, by_hand(lambda name: hand.get(name, (1.0, None))), 1e-4)


def halving(step):
    return 0.5 ** step.astype(jnp.float32)


RULES: dict[str, dict[Any, Any]] = {
    "multiplier": {"head/**": {"learning_rate_multiplier": 0.25}},
    "schedule": {"head/**": {"learning_rate_multiplier": halving}},
    "layers": {"stack/*": {"learning_rate_multiplier": [0.0, 0.5, 2.0]}},
    "decay": {"**/bias": {"weight_decay": 0}, "head/**": {"weight_decay": 0.5}},
    "clip": {"head/**": {"clip_norm": 0.5}, "body/**": {"clip_norm": 0.1}},
    "noise": {"**/bias": {"noise_scale": 0}, "head/**": {"noise_scale": 0.5}},
    "freeze": {"head/bias": {"freeze": False}, "head/**": {"freeze": True}},
    "optimizer": {"head/**": {"optimizer": "SGD", "weight_decay": 0.1}},
    "regex": {re.compile("bias$"): {"weight_decay": 0, "state_dtype": "float32"}},
}


@pytest.mark.parametrize("name", RULES)
def test_small_parameters_in_one_array_change_nothing(name):
    options = {"clip_gradients": 5.0, "gradient_noise_scale": 0.1, "seed": 3}
    plain, packed = (trained(make(RULES[name], b, **options)) for b in (None, "auto"))
    assert_alike(packed.params, plain.params, 4)
    assert_alike(packed.optimizer, plain.optimizer, 8)


def two_rates(make_one, rule=None):
    """Train with optax's `multi_transform` of two: one for `head`, the other for the rest."""
    labels = {k: jax.tree.map(lambda _, k=k: k == "head", tree) for k, tree in PARAMS.items()}
    txs = {True: make_one(0.025) if rule is None else rule, False: make_one(0.1)}
    as_optax: Any = {k: optax.GradientTransformationExtraArgs(*x) for k, x in txs.items()}
    tx = optax.multi_transform(as_optax, labels)
    params, state = PARAMS, tx.init(PARAMS)
    for grads in BATCHES:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


QUARTER = {"head/**": {"learning_rate_multiplier": 0.25}}


@pytest.mark.parametrize("bucket", [None, "auto"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Lion", "RMSprop"])
def test_a_multiplier_is_another_learning_rate(name, bucket):
    """Decay that goes by the rate is multiplied too."""
    made = lambda rate: getattr(ol.optimizers, name)(rate, weight_decay=0.2)
    state = trained(make(QUARTER, bucket, optimizer=made))
    assert_close(state.params, two_rates(lambda rate: made(rate).chain))


def test_a_multiplier_equals_optaxs_two_rates(as_optax_expects):
    adamw = lambda rate: optax.adamw(rate, weight_decay=0.2)
    ours = make(
        {"head/**": {"learning_rate_multiplier": 0.25}},
        optimizer=T.chain(adam=T.ScaleByAdam(), decay=T.AddWeightDecay(0.2)),
    )
    of_optax = make(QUARTER, optimizer=adamw(0.1), learning_rate=None)
    assert_close(trained(ours).params, two_rates(adamw))
    assert_close(trained(of_optax).params, two_rates(adamw))


def test_a_multiplier_of_a_rule_that_reads_moved_parameters():
    """LAMB sees the parameter after its whole decay; then all that it moved by is multiplied."""
    lamb = lambda rate: ol.optimizers.Lamb(rate, weight_decay=0.2)
    whole = trained(make(None, optimizer=lamb), batches=BATCHES[:1]).params
    part = trained(make(QUARTER, optimizer=lamb), batches=BATCHES[:1]).params
    for old, a, b in zip(*(jax.tree.leaves(x["head"]) for x in (PARAMS, whole, part)), strict=True):
        np.testing.assert_allclose(b - old, 0.25 * (a - old), rtol=1e-5, atol=1e-7)
    assert_alike(part["body"], whole["body"], 0)


def test_a_stacked_leaf_has_a_multiplier_for_each_layer():
    params = {"stack": PARAMS["stack"]["w"]}
    batches = [{"stack": b["stack"]["w"]} for b in BATCHES]
    apart = lambda tree: {f"layer_{i}": tree["stack"][i] for i in range(3)}
    factors = [0.0, 0.5, 2.0]
    rules = {"stack": {"learning_rate_multiplier": np.array(factors)}}
    each = {f"layer_{i}": {"learning_rate_multiplier": f} for i, f in enumerate(factors)}
    got = trained(make(rules), params, batches).params
    want = trained(make(each), apart(params), [apart(b) for b in batches]).params
    assert_close(apart(got), want)
    np.testing.assert_array_equal(got["stack"][0], params["stack"][0])


def test_decay_is_added_where_the_optimizer_has_none():
    rules = {"**/bias": {}, "**": {"weight_decay": 0.5}}
    got = trained(make(rules, optimizer=lambda r: ol.optimizers.Adam(r)))
    exempt = ol.optimizers.AdamW(0.1, weight_decay=0.5)
    exempt.exclude_from_weight_decay(var_names=["bias"])
    want = trained(make(None, optimizer=exempt, learning_rate=None))
    assert_alike(got.params, want.params, 0)


def test_decay_takes_the_place_and_the_kind_of_the_optimizers():
    """Coupled decay, before the rule, stays coupled."""

    def coupled(decay):
        return T.chain(l2=T.AddWeightDecay(decay), adam=T.ScaleByAdam())

    rules = {"**": {"weight_decay": 0.5}}
    got = trained(make(rules, optimizer=coupled(0.1)))
    assert_alike(got.params, trained(make(None, optimizer=coupled(0.5))).params, 0)


def test_muon_decays_by_rules_whichever_of_its_optimizers_moves_a_parameter():
    muon = lambda rate: ol.optimizers.Muon(rate, weight_decay=None, adam_weight_decay=0.1)
    step = make({"**": {"weight_decay": 0.5}}, optimizer=muon)
    both = ol.optimizers.Muon(0.1, weight_decay=0.5, adam_weight_decay=0.5)
    want = trained(make(None, optimizer=both, learning_rate=None))
    assert_close(trained(step).params, want.params)


def test_each_rule_clips_its_parameters_before_the_global_clip():
    rules = {"head/**": {"clip_norm": 1.0}, "body/**": {"clip_norm": 2.0}}
    step = make(rules, optimizer="SGD", learning_rate=1.0, clip_gradients=2.0)
    grads = jax.tree.map(lambda p: 3.0 * jnp.ones_like(p), PARAMS)
    state, metrics = step(step.init(PARAMS), grads)
    moved = jax.tree.map(jnp.subtract, PARAMS, state.params)
    norm = lambda tree: float(optax.tree.norm(tree))
    stack = 3 * 12**0.5
    total = (1 + 4 + stack**2) ** 0.5
    assert norm(moved) == pytest.approx(2.0, rel=1e-5)
    assert norm(moved["head"]) == pytest.approx(2 / total, rel=1e-5)
    assert norm(moved["body"]) == pytest.approx(4 / total, rel=1e-5)
    assert metrics["global_norm/clipped_gradient_norm"] == pytest.approx(2.0, rel=1e-5)


def test_noise_of_a_rule_is_the_noise_of_that_scale():
    rules = {"**/bias": {"noise_scale": 0.0}, "head/**": {"noise_scale": 0.5}}
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    options = {"optimizer": "SGD", "learning_rate": 1.0, "seed": 3}

    def moved(rules, scale):
        step = make(rules, gradient_noise_scale=scale, **options)
        return jax.tree.map(jnp.subtract, trained(step, batches=[still]).params, PARAMS)

    got, low, high = moved(rules, 0.1), moved(None, 0.1), moved(None, 0.5)
    want = {**low, "head": dict(high["head"])}
    for part in ("body", "head"):
        want[part] = {**want[part], "bias": still[part]["bias"]}
    assert_alike(got, want, 0)
    alone = moved(rules, None)
    assert_alike(alone["head"], got["head"], 0)
    assert_alike(alone["stack"], still["stack"], 0)


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_frozen_is_as_if_not_among_the_variables(bucket):
    rules = {"head/bias": {}, "head/**": {"freeze": True}}
    got = trained(make(rules, bucket))
    want = trained(make(None, bucket, variables=["head/bias", "body/**", "stack/**"]))
    assert_alike(got.params, want.params, 0)
    assert_alike(got.optimizer, want.optimizer, 0)
    np.testing.assert_array_equal(got.params["head"]["kernel"], PARAMS["head"]["kernel"])
    assert jax.tree.structure(got.packed_optimizer) == jax.tree.structure(want.packed_optimizer)


@pytest.mark.parametrize("bucket", [None, "auto"])
def test_an_optimizer_of_a_rule_is_that_of_a_multi_optimizer(bucket):
    adam, lion = ol.optimizers.Adam(0.1), ol.optimizers.Lion(0.02, weight_decay=0.1)
    sgd = ol.optimizers.SGD(0.5, momentum=0.9, clipnorm=1.0)
    rules = {"head/**": {"optimizer": lion}, "stack/*": {"optimizer": sgd}}
    got = make(rules, bucket, optimizer=adam, learning_rate=None)
    multi = ol.optimizers.MultiOptimizer({"head/**": lion, "stack/*": sgd}, adam)
    want = make(None, bucket, optimizer=multi, learning_rate=None)
    one, two = trained(got), trained(want)
    assert_alike(one.params, two.params, 0)
    assert one.optimizer["step"] == two.optimizer["step"] == 3
    assert {"adam", "Lion.lion", "SGD.momentum"} <= set(one.optimizer)


OPTIMIZERS = {
    "name": "SGD",
    "class": ol.optimizers.SGD,
    "optimizer": ol.optimizers.SGD(0.1),
    "function": lambda rate: optax.sgd(rate),
    "link": T.ScaleByMomentum(0.0),
    "chain": T.chain(rate=T.ScaleByLearningRate(0.1)),
    "optax": optax.sgd(0.1),
    "optax-with-state": optax.sgd(lambda count: 0.1, momentum=0.0),
}


@pytest.mark.parametrize("base", ["Adam", "optax"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_whatever_an_optimizer_may_be_a_rule_may_have(kind, base, as_optax_expects):
    options = {} if base == "Adam" else {"optimizer": optax.adam(0.1), "learning_rate": None}
    if base == "optax" and kind in ("name", "class", "function", "link"):
        kind = "optimizer"  # the others take the rate of all
    rules = {"head/**": {"optimizer": OPTIMIZERS[kind]}}
    got = trained(make(rules, **{"optimizer": "Adam", **options})).params
    sums = jax.tree.map(lambda p, *g: p - 0.1 * sum(g), PARAMS, *BATCHES)
    want = trained(make(None, **{"optimizer": "Adam", **options})).params
    assert_close(got["head"], sums["head"])
    assert_close({k: got[k] for k in ("body", "stack")}, {k: want[k] for k in ("body", "stack")})


# Numbers of rules are numbers of the state.


def test_numbers_of_rules_are_set_without_a_new_trace():
    rules = {
        "head/bias": {"weight_decay": 0.1, "noise_scale": 0.2, "clip_norm": 0.5},
        "head/**": {"learning_rate_multiplier": 0.5},
        "stack/*": {"learning_rate_multiplier": [1, 2, 3]},
        "body/**": {"optimizer": "SGD", "weight_decay": 0.1},
    }
    step = make(rules, gradient_noise_scale=0.0)
    state, _ = step(step.init(PARAMS), BATCHES[0])
    for value in (0.3, np.float32(1), jnp.float32(2), 1):
        numbers = {
            "weight_decay/weight_decay/head/bias": value,
            "gradient_noise/scale/head/bias": value,
            "rules.clip_norm.head.bias/max_norm": value,
            "rules.learning_rate_multiplier/multiplier/head/**": value,
            "rules.learning_rate_multiplier.stack.*/1": value,
            "SGD.rules.weight_decay/weight_decay/body/**": value,
            "SGD.rate/learning_rate": value,
        }
        state = state.set(**numbers)
        for name in numbers:
            link, number = name.split("/", 1)
            assert state.optimizer[link][number] == np.float32(value)
        state, _ = step(state, BATCHES[1])
    assert step._programs[False, True]._cache_size() == 1
    with pytest.raises(ValueError, match="at least 0"):
        state.set(**{"weight_decay/head/bias": -1.0})
    back = state.set(**{"weight_decay/head/bias": None})
    assert back.optimizer["weight_decay"]["weight_decay/head/bias"] == np.float32(0.1)


def test_a_set_number_is_that_of_a_rule():
    one = trained(make({"head/**": {"learning_rate_multiplier": 0.5, "weight_decay": 0.1}}))
    step = make({"head/**": {"learning_rate_multiplier": 1.0, "weight_decay": 0.0}})
    name = "rules.learning_rate_multiplier/head/**"
    two = trained(step, **{name: 0.5, "weight_decay/head/**": 0.1})
    assert_alike(two.params, one.params, 0)


def test_a_rule_of_nothing_but_ones_changes_nothing():
    plain = trained(make(None))
    ruled = trained(make({"**": {"learning_rate_multiplier": 1.0}}))
    assert_alike(ruled.params, plain.params, 0)


def test_many_steps_pickles_and_sweeps():
    step = make(RULES["decay"] | RULES["layers"])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)
    state, _ = step.many(step.init(PARAMS), stacked)
    assert_alike(state.params, trained(step).params, 1)
    again = pickle.loads(pickle.dumps(step))
    assert_alike(trained(again).params, state.params, 1)
    name = "weight_decay/head/**"
    first = step.init(PARAMS)
    states = jax.vmap(lambda x: first.set(**{name: x}))(jnp.array([0.5, 0.0]))
    swept, _ = jax.vmap(step, in_axes=(0, None))(states, BATCHES[0])
    one = trained(step, batches=BATCHES[:1])
    assert_close(jax.tree.map(lambda x: x[0], swept.params), one.params)


# All libraries' trees.


@dataclasses.dataclass
class Model:
    kernel: Any
    bias: Any


jax.tree_util.register_dataclass(Model, ["kernel", "bias"], [])

MODELS = {
    "dict": lambda: {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}},
    "dataclass": lambda: Model(jnp.ones((3, 2)), jnp.ones(2)),
    "nnx": lambda: nnx.split(
        nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1))),
        nnx.Param,
    )[1],
    "linen": lambda: linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3))),
    "equinox": lambda: equinox.filter(
        equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), equinox.is_inexact_array
    ),
    "haiku": lambda: haiku.transform(lambda x: haiku.Linear(2)(x)).init(
        jax.random.key(0), jnp.ones((1, 3))
    ),
}


@pytest.mark.parametrize("library", MODELS)
def test_rules_go_by_names_whatever_the_tree(library):
    """Without a gradient, a kernel shrinks by 1 - rate · decay · multiplier; a bias by half."""
    params = MODELS[library]()
    biases = re.compile("bias$|/b$")
    rules = {
        biases: {"optimizer": T.chain(d=T.AddWeightDecay(0.5), rate=T.ScaleByLearningRate(1.0))},
        "**": {"weight_decay": 0.5, "learning_rate_multiplier": 0.5},
    }
    loss = lambda params: 0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
    step = ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD", rules=rules)
    state, _ = step(step.init(params))
    for name, new, old in zip(
        leaf_names(params), *map(jax.tree.leaves, (state.params, params)), strict=True
    ):
        factor = 0.5 if biases.search(name) else 0.75
        np.testing.assert_allclose(new, factor * old, rtol=1e-6, err_msg=name)


NNX = {
    "partition-by-function": (
        {"**/bias": {"optimizer": optax.sgd(0.1)}},
        {"optimizer": optax.adam(0.1), "learning_rate": None},
    ),
    "partition-by-tree": (
        {"layers/0/*": {"optimizer": "SGD"}, "layers/1/*": {"optimizer": "Lion"}},
        {},
    ),
    "mask-of-decay": ({"**/bias": {"weight_decay": 0.0}}, {"optimizer": "AdamW"}),
}


@pytest.mark.parametrize("name", NNX)
def test_what_does_not_work_in_nnx_with_optaxs_masks_does_with_rules(name, as_optax_expects):
    rules, options = NNX[name]
    graph = nnx.split(
        nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1))),
        nnx.Param,
    )[0]
    loss = lambda params, x: jnp.mean(nnx.merge(graph, params)(x) ** 2)
    step = make(rules, loss=loss, **options)
    state, first = step(step.init(MODELS["nnx"]()), jnp.ones((4, 3)))
    for _ in range(20):
        state, last = step(state, jnp.ones((4, 3)))
    assert last["loss"] < first["loss"]


# What is wrong raises, naming pattern and key.

ROWS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "no-mapping": (["head/**"], ol.InvalidType, ("`rules`", "map patterns")),
    "pattern": ({1: {}}, ol.InvalidType, ("`rules`", "pattern")),
    "no-dict": ({"head/**": 0.1}, ol.InvalidType, ("rules['head/**']", "0.1")),
    "key": ({"head/**": {"decay": 0}}, ValueError, ("'head/**'", "'decay'", "'weight_decay'")),
    "16-negative": ({"**": {"weight_decay": -1}}, ValueError, ("'**'", "weight_decay", "-1")),
    "16-flag": ({"**": {"weight_decay": True}}, ol.InvalidType, ("weight_decay", "True")),
    "nan": ({"**": {"noise_scale": float("nan")}}, ValueError, ("noise_scale", "nan")),
    "text": ({"**": {"learning_rate_multiplier": "2"}}, ol.InvalidType, ("multiplier", "'2'")),
    "zero-clip": ({"**": {"clip_norm": 0}}, ValueError, ("clip_norm", "above 0")),
    "layers": ({"stack/*": {"learning_rate_multiplier": [1, -1]}}, ValueError, ("[1]", "-1")),
    "no-layers": ({"stack/*": {"learning_rate_multiplier": []}}, ol.InvalidType, ("multiplier",)),
    "matrix": ({"**": {"learning_rate_multiplier": np.ones((2, 2))}}, ol.InvalidType, ("(2, 2)",)),
    "freeze": ({"**": {"freeze": 1}}, ol.InvalidType, ("freeze", "1")),
    "state-dtype": ({"**": {"state_dtype": "float33"}}, ValueError, ("state_dtype", "float33")),
    "no-dtype": ({"**": {"state_dtype": None}}, ol.InvalidType, ("state_dtype", "None")),
    "optimizer": ({"**": {"optimizer": "Adaam"}}, ValueError, ("'Adaam'", "'Adam'")),
    "no-optimizer": ({"**": {"optimizer": None}}, ol.InvalidType, ("optimizer", "None")),
    "gate": (
        {"**": {"optimizer": ol.optimizers.SGD(0.1, gradient_accumulation_steps=2)}},
        ol.InvalidType,
        ("'**'", "accumulate"),
    ),
    "sum": (
        {"**": {"optimizer": T.chain(sum=T.SumOverAxis("d"), r=T.ScaleByLearningRate(1.0))}},
        ol.InvalidType,
        ("'**'", "sum"),
    ),
    "same-text": ({"a": {}, re.compile("a"): {}}, ValueError, ("different", "'a'")),
    "27-nothing": ({"haed/**": {}}, ValueError, ("'haed/**'", "'head/bias'")),
    "taken": ({"**": {}, "head/bias": {}}, ValueError, ("'head/bias'", "never decides")),
    "wrong-length": (
        {"stack/*": {"learning_rate_multiplier": [1, 2]}},
        ValueError,
        ("'stack/w'", "(3, 2, 2)", "2 numbers"),
    ),
    "all-frozen": ({"**": {"freeze": True}}, ValueError, ("no variables", "`rules`")),
    "schedule": ({"**": {"weight_decay": lambda a, b: 1.0}}, ol.InvalidType, ("weight_decay",)),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_is_wrong_raises(name):
    rules, error, says = ROWS[name]
    with pytest.raises(error) as caught:
        trained(make(rules))
    assert type(caught.value) is error
    for text in says:
        assert text in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


REFUSED = {
    "decay-of-optax": ({"**": {"weight_decay": 0.1}}, optax.adam(0.1), None),
    "two-decays": (
        {"**": {"weight_decay": 0.1}},
        T.chain(a=T.AddWeightDecay(0.1), s=T.ScaleByAdam(), b=T.AddWeightDecay(0.1)),
        0.1,
    ),
    "decay-of-ftrl": ({"**": {"weight_decay": 0.1}}, "Ftrl", 0.1),
    "decay-of-dual-averaging": (
        {"**": {"weight_decay": 0.1}},
        ol.optimizers.AdagradDAOptimizer(0.1),
        None,
    ),
    "multiplier-of-ftrl": ({"**": {"learning_rate_multiplier": 0.1}}, "Ftrl", 0.1),
    "multiplier-of-schedule-free": (
        {"**": {"learning_rate_multiplier": 0.1}},
        ol.optimizers.ScheduleFreeAdamW,
        0.1,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_optimizer_does_not_allow_raises(name):
    rules, optimizer, rate = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape("rules['**']")):
        make(rules, optimizer=optimizer, learning_rate=rate)


def test_a_rule_that_matches_only_integers_raises():
    step = make({"count": {"weight_decay": 0.1}})
    with pytest.raises(ValueError, match="matches no parameter"):
        step.init({"count": 3, "w": 1.0})


def test_state_dtype_is_the_precision_of_some():
    def made(**options):
        step = ol.optimize_loss(
            lambda p, x: sum(jnp.sum((w * x) ** 2) for w in p.values()),
            learning_rate=0.1,
            bucket=None,
            **options,
        )
        state, _ = step(step.init({n: jnp.ones(8) for n in ("a", "b", "c")}), 1.0)
        return state

    rules = {"a": {"freeze": True}, "b": {"weight_decay": 0.1}, "*": {"state_dtype": "bfloat16"}}
    own = made(rules=rules).optimizer["adam"]
    assert own["m+v_bf16"]["c"].dtype == jnp.uint32
    assert own["m"]["b"].dtype == jnp.float32
    other = made(rules={"a": {"state_dtype": "float32"}}, precision="bfloat16").optimizer["adam"]
    assert other["m"]["a"].dtype == jnp.float32
    assert other["m+v_bf16"]["b"].dtype == jnp.uint32
    with pytest.raises(ValueError, match="`precision` must be one format for all"):
        made(rules={"a": {"state_dtype": "float32"}}, precision=ol.Precision({"b": "bfloat16"}))


def test_muon_has_its_parts_beside_a_rule_with_an_optimizer():
    def stepped(params, **options):
        step = ol.optimize_loss(
            lambda p, _: sum(jnp.sum(jnp.sin(x) * x) for x in p.values()),
            learning_rate=0.1,
            **options,
        )
        return step.many(step.init(params), jnp.zeros((3, 0)))[0].params

    rng = np.random.default_rng(0)
    body, head = (
        {f"{part}/{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes}
        for part, shapes in (("body", [("k", (3, 4)), ("b", (4,))]), ("head", [("k", (4, 2))]))
    )
    both = stepped(body | head, optimizer="Muon", rules={"head/**": {"optimizer": "AdamW"}})
    alone = stepped(body, optimizer="Muon") | stepped(head, optimizer="AdamW")
    for name, param in both.items():
        np.testing.assert_allclose(param, alone[name], rtol=1e-6)
