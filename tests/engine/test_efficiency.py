"""What the update costs, in things that can be counted: temporaries, passes, traces, equations."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optimize_loss as ol

T = ol.transforms
RATE = T.ScaleByLearningRate(1e-3)
SIZE = 1 << 20
# XLA's of jax 0.8 writes the gradients behind a clip to memory, whatever the chain.
new_xla = pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="temporaries are XLA's")


def adamw(**first):
    decay = T.AddWeightDecay(1e-2)
    return T.chain(**first, adam=T.ScaleByAdam(), decay=decay, rate=RATE)


def compiled(tx, params, how="update"):
    def step(grads, params, state):
        if how == "apply":
            return tx.apply(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    arguments = params, params, jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(1, 2)).lower(*arguments).compile()


def shapes(leaves, size=SIZE):
    return {f"p{i}": jax.ShapeDtypeStruct((size // leaves,), jnp.float32) for i in range(leaves)}


CLIP = T.ClipByGlobalNorm(1.0)
NORM = T.ObserveNorm()
BEFORE_THE_RULE = {
    "nothing": {},
    "value": {"clip": T.ClipByValue(1.0)},
    "global-norm": {"clip": CLIP},
    "global-norm-observed": {"before": NORM, "clip": CLIP, "after": NORM},
    "adaptive": {"clip": T.ClipByAdaptiveNorm()},
    "multiplied": {"multiply": T.MultiplyGradients({"*": 0.5}), "clip": CLIP},
}
ADAM = {"adam": T.ScaleByAdam(), "rate": RATE}
FIRST = T.ShrinkParams(1e-2)
CHAINS = {name: adamw(**first) for name, first in BEFORE_THE_RULE.items()} | {
    "decay-first": T.chain(clip=CLIP, decay=FIRST, **ADAM),
    "decay-before-the-clip": T.chain(decay=FIRST, clip=CLIP, **ADAM),
    "groups": T.chain(
        clip=CLIP,
        one=T.ForParameters("p0", T.ClipByGlobalNorm(0.5)),
        decay=T.ForParameters("p0", FIRST),
        **ADAM,
    ),
    "loss-scale": T.chain(unscale=T.DivideByLossScale(8.0), clip=CLIP, **ADAM),
}


def assert_in_place(program, bytes_of_a_parameter):
    """What is donated is written over, and there is no temporary the size of the model."""
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.05 * SIZE
    assert memory.alias_size_in_bytes >= bytes_of_a_parameter * SIZE


@new_xla
@pytest.mark.parametrize("leaves", [1, 4])
@pytest.mark.parametrize("name", CHAINS)
def test_the_update_makes_no_temporary_the_size_of_the_model(name, leaves):
    assert_in_place(compiled(CHAINS[name], shapes(leaves)), 12)  # the parameters, m and v


SCALE, ACCUMULATE = T.DivideByDynamicLossScale(), T.Accumulate(4)
BEHIND_GATES = {
    "accumulate": (T.chain(gate=ACCUMULATE, **ADAM), 16),  # the sum, too
    "accumulate-and-clip": (T.chain(gate=ACCUMULATE, clip=CLIP, decay=FIRST, **ADAM), 16),
    "loss-scale": (T.chain(gate=SCALE, **ADAM), 12),
    "loss-scale-and-clip": (T.chain(gate=SCALE, clip=CLIP, decay=FIRST, **ADAM), 12),
    "both": (T.chain(scale=SCALE, gate=ACCUMULATE, clip=CLIP, **ADAM), 16),
    "guard": (T.chain(skip=T.SkipNonFinite(), seen=NORM, clip=CLIP, **ADAM), 12),
    "guard-of-spikes": (T.chain(skip=T.SkipSpikes(), clip=CLIP, decay=FIRST, **ADAM), 12),
    "three": (T.chain(skip=T.SkipSpikes(), scale=SCALE, gate=ACCUMULATE, clip=CLIP, **ADAM), 16),
    "average": (T.chain(gate=ACCUMULATE, **ADAM, average=T.AverageParams()), 20),
}


@new_xla
@pytest.mark.parametrize("leaves", [1, 4])
@pytest.mark.parametrize("name", BEHIND_GATES)
def test_a_gate_makes_no_temporary_the_size_of_the_model(name, leaves):
    """With `apply`; `update` has the updates to return from behind the gate."""
    tx, bytes_of_a_parameter = BEHIND_GATES[name]
    assert_in_place(compiled(tx, shapes(leaves), "apply"), bytes_of_a_parameter)


def test_accumulation_keeps_four_bytes_a_parameter():
    state = jax.eval_shape(T.chain(gate=ACCUMULATE).init, shapes(4))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 4 * SIZE + 3 * 4


def test_all_norms_around_a_clip_cost_one_pass():
    """Count the reductions over gradients outside the branch for numbers out of range."""

    def reductions(tx):
        lowered = jax.jit(tx.update).lower(shapes(1), jax.eval_shape(tx.init, shapes(1)))
        functions = re.findall(r"func private @(\w+)\((.*?)\n  }", lowered.as_text(), re.DOTALL)
        groups = [name for name, body in functions if "call @_squares(" in body]
        return sum(len(re.findall(rf"call @{name}\(", lowered.as_text())) for name in groups)

    alone = T.chain(clip=CLIP, rate=RATE)
    observed = T.chain(multiply=T.MultiplyGradients({"*": 2.0}), a=NORM, clip=CLIP, b=NORM, r=RATE)
    scaled = T.chain(skip=T.SkipSpikes(), scale=SCALE, a=NORM, clip=CLIP, rate=RATE)
    assert reductions(alone) == 1
    assert reductions(observed) == 1
    assert reductions(T.chain(skip=T.SkipNonFinite(), a=NORM, clip=CLIP, rate=RATE)) == 1
    assert reductions(scaled) == 1


def equations(jaxpr):
    """Return the number of equations, those of inner programs counted once each."""
    inner = [p.jaxpr for e in jaxpr.eqns for p in e.params.values() if hasattr(p, "jaxpr")]
    inner += [b.jaxpr for e in jaxpr.eqns for b in e.params.get("branches", ())]
    seen = {id(j): j for j in inner}
    return len(jaxpr.eqns) + sum(equations(j) for j in seen.values())


def test_a_leaf_adds_few_equations():
    """optax's clip and AdamW write out some 28 equations for every leaf."""

    def count(tx, leaves):
        params = shapes(leaves, 8 * leaves)
        state = jax.eval_shape(tx.init, params)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            return equations(jax.make_jaxpr(tx.update)(params, state, params).jaxpr)

    ours = adamw(clip=CLIP)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    per_leaf = (count(ours, 300) - count(ours, 100)) / 200
    assert per_leaf <= 6
    assert per_leaf <= 0.5 * (count(theirs, 300) - count(theirs, 100)) / 200


def test_each_distinct_shape_is_traced_once():
    traced = []

    class Counted(T.ScaleByLearningRate):
        def factor(self, k):
            traced.append(1)
            return super().factor(k)

    tx = T.chain(clip=T.ClipByValue(1.0), rate=Counted(0.1))
    params = {**shapes(50, 400), "big": jax.ShapeDtypeStruct((9,), jnp.float32)}
    jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params))
    assert len(traced) == 2
