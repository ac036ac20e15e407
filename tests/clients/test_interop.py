"""Our chains inside optax and flax, optax's transformations inside ours, and where both agree."""

from typing import Any

import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

import optimize_loss as ol
from optimize_loss import optimizers as optim
from optimize_loss import transforms as T
from tests.cases import LOSS, SHAPES, params, random_like

STEPS = 20


@pytest.fixture(autouse=True)
def as_optax_needs_it():
    """optax multiplies bools and integers by floats, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def gradients(t):
    """Return gradients that grow and shrink, so that clipping acts on some of them."""
    size = [0.1, 1.0, 10.0][t % 3]
    return jax.tree.map(lambda g: size * g, random_like(SHAPES, 100 + t))


def trajectory(tx, steps=STEPS, grads=gradients, **extra):
    """Return the parameters after every step, stacked."""

    @jax.jit
    def step(p, state, g):
        updates, state = tx.update(g, state, p, **extra)
        return optax.apply_updates(p, updates), state

    p, seen = params(), []
    state = tx.init(p)
    for t in range(steps):
        p, state = step(p, state, grads(t))
        seen.append(p)
    return jax.tree.map(lambda *xs: np.stack(xs), *seen)


def assert_close(got, want, relative=1e-6):
    """Compare trajectories, relative to 1 + |want|."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=relative, atol=relative), got, want
    )


# Where the mathematics is the same.

# ours, optax's; over 20 steps.
EQUAL = {
    "sgd": (optim.GradientDescentOptimizer(0.1), optax.sgd(0.1)),
    "momentum": (optim.MomentumOptimizer(0.01, 0.9), optax.sgd(0.01, 0.9)),
    "nesterov": (
        optim.MomentumOptimizer(0.01, 0.9, use_nesterov=True),
        optax.sgd(0.01, 0.9, nesterov=True),
    ),
    "adagrad": (optim.AdagradOptimizer(0.1), optax.adagrad(0.1, eps=0.0)),
    "adagrad-epsilon": (
        T.chain(adagrad=T.ScaleByAdagrad(0.1, 1e-3), rate=T.ScaleByLearningRate(0.1)),
        optax.adagrad(0.1, eps=1e-3),
    ),
    "rmsprop": (
        optim.RMSPropOptimizer(0.01),
        optax.rmsprop(0.01, 0.9, eps=1e-10, initial_scale=1.0),
    ),
    "rmsprop-momentum": (
        optim.RMSPropOptimizer(0.01, 0.8, momentum=0.5, epsilon=1e-5),
        optax.rmsprop(0.01, 0.8, eps=1e-5, initial_scale=1.0, momentum=0.5),
    ),
    "rmsprop-centered": (
        optim.RMSPropOptimizer(0.01, 0.9, epsilon=1e-3, centered=True),
        optax.rmsprop(0.01, 0.9, eps=1e-3, initial_scale=1.0, centered=True),
    ),
    "rmsprop-from-0": (
        T.chain(rms=T.ScaleByRMS(0.9, 1e-7), rate=T.ScaleByLearningRate(0.01)),
        optax.rmsprop(0.01, 0.9, eps=1e-7),
    ),
    "adadelta": (optim.AdadeltaOptimizer(1.0, 0.95, 1e-6), optax.adadelta(1.0, 0.95, 1e-6)),
    "adam": (optim.AdamOptimizer(0.01, epsilon=1e-30), optax.adam(0.01, eps=1e-30)),
    "adamw": (
        T.chain(
            adam=T.ScaleByAdam(epsilon=1e-30),
            decay=T.AddWeightDecay(0.1, exclude=("**/bias",)),
            rate=T.ScaleByLearningRate(0.01),
        ),
        optax.adamw(
            0.01,
            eps=1e-30,
            weight_decay=0.1,
            mask={"encoder": {"layer_0": {"bias": False, "kernel": True}}, "scale": True},
        ),
    ),
    "l2": (
        T.chain(decay=T.AddWeightDecay(0.1), rate=T.ScaleByLearningRate(0.1)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    ),
    "global-clip": (
        T.chain(clip=T.ClipByGlobalNorm(1.0), rate=T.ScaleByLearningRate(0.1)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    ),
    "value-clip": (
        T.chain(clip=T.ClipByValue(0.5), rate=T.ScaleByLearningRate(0.1)),
        optax.chain(optax.clip(0.5), optax.sgd(0.1)),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equals_optax(name):
    ours, theirs = EQUAL[name]
    assert_close(trajectory(ours), trajectory(theirs))


# optax's transformations as links of our chain.

KERNELS = {"encoder": {"layer_0": {"bias": False, "kernel": True}}, "scale": False}
FOREIGN = {
    "adam": optax.adam(0.01),
    "adamw-mask-tree": optax.adamw(0.01, weight_decay=0.1, mask=KERNELS),
    "adamw-mask-function": optax.adamw(
        0.01, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "sgd-momentum": optax.sgd(0.01, 0.9),
    "trace": optax.chain(optax.trace(0.9, nesterov=True), optax.scale(-0.01)),
    "lion": optax.lion(0.01),
    "lamb": optax.lamb(0.01),
    "rate-schedule": optax.sgd(optax.linear_schedule(0.1, 0.0, 10)),
    "chain": optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(), optax.scale(-0.01)),
    "masked": optax.masked(optax.sgd(0.1), KERNELS),
    "noise": optax.chain(optax.add_noise(0.1, 0.55, 0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_optax_as_a_link_is_optax(name):
    theirs = FOREIGN[name]
    assert_close(trajectory(T.chain(theirs=theirs), 10), trajectory(theirs, 10))


@pytest.mark.parametrize("name", FOREIGN)
def test_optax_between_our_links(name):
    theirs = FOREIGN[name]
    ours = T.chain(clip=T.ClipByValue(0.5), theirs=theirs, more=T.ScaleByMomentum(0.5))
    wanted = optax.chain(optax.clip(0.5), theirs, optax.trace(0.5))
    assert_close(trajectory(ours, 10), trajectory(wanted, 10))


@pytest.mark.parametrize("name", FOREIGN)
def test_apply_runs_an_optax_link_as_update_does(name):
    tx = T.chain(theirs=FOREIGN[name])
    g, p = gradients(0), params()
    updates, after = jax.jit(tx.update)(g, tx.init(p), p)
    new, state = jax.jit(tx.apply)(g, tx.init(p), p)
    assert_close(new, optax.apply_updates(p, updates))
    assert jax.tree.structure(state) == jax.tree.structure(after)


@pytest.mark.parametrize("name", ["dog", "prodigy", "cocob"])
def test_an_optax_state_may_hold_the_parameters_themselves(name):
    """A step gives away the memory of each array once."""
    step = ol.optimize_loss(
        lambda p: jnp.sum(p["w"] ** 2), optimizer=getattr(optax.contrib, name)()
    )
    state, _ = step(step.init({"w": jnp.ones(3)}))
    assert step(state)[1]["loss"] <= 3.0


def plateau():
    return optax.contrib.reduce_on_plateau(factor=0.5, patience=2)


def test_extra_arguments_reach_an_optax_link():
    """A loss that does not fall halves the updates after two steps, and again after two more."""
    tx = T.chain(plateau=plateau())
    p = {"w": jnp.zeros(())}
    state = tx.init(p)
    seen = []
    for _ in range(6):
        updates, state = tx.update({"w": jnp.ones(())}, state, p, value=LOSS)
        seen.append(float(updates["w"]))
    assert seen == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_extra_arguments_reach_both():
    ours = T.chain(loss=T.AverageLoss(0.5), sgd=optax.sgd(0.1), plateau=plateau())
    theirs = optax.chain(optax.sgd(0.1), plateau())
    got, wanted = (trajectory(tx, 10, value=LOSS) for tx in (ours, theirs))
    assert_close(got, wanted)


# Our chain where optax and flax expect one of theirs.


def ours() -> Any:
    """A chain that reads parameters, has slots, and memory for the whole tree."""
    return T.chain(
        clip=T.ClipByGlobalNorm(1.0),
        seen=T.ObserveNorm(),
        adam=T.ScaleByAdam(),
        decay=T.AddWeightDecay(0.1),
        rate=T.ScaleByLearningRate(0.01),
        average=T.AverageParams(0.9),
    )


def test_inside_optax_chain():
    """optax halves the gradients before our chain and doubles the updates after it."""
    got = trajectory(optax.chain(optax.scale(0.5), ours(), optax.scale(2.0)))
    wanted = T.chain(half=T.MultiplyGradients({"**": 0.5}), **dict(ours().links[:-1]))
    twice = T.chain(**dict(wanted.links), twice=T.MultiplyGradients({"**": 2.0}))
    assert_close(got, trajectory(twice))


def test_loss_reaches_our_links_inside_optax_chain():
    """optax passes `value` on to transformations that take extra arguments, as ours does."""
    average: Any = T.chain(loss=T.AverageLoss(0.5))
    tx: Any = optax.chain(optax.scale(1.0), average)
    p = {"w": jnp.zeros(())}
    _, state = tx.update(p, tx.init(p), p, value=jnp.float32(8.0))
    assert state[1]["loss"]["mean"] == 4.0


def test_chain_as_a_link_of_a_chain():
    inner = T.chain(loss=T.AverageLoss(0.5), momentum=T.ScaleByMomentum(0.9))
    outer = T.chain(inner=inner, rate=T.ScaleByLearningRate(0.01))
    assert_close(trajectory(outer, value=LOSS), trajectory(optax.sgd(0.01, 0.9)))


def test_numbers_are_set_inside_optax_chain():
    """What `optax.inject_hyperparams` is for: a chain's numbers are in its state anyway."""
    rate: Any = T.chain(rate=T.ScaleByLearningRate(0.5))
    tx: Any = optax.chain(optax.scale(1.0), rate)
    p = {"w": jnp.ones(())}
    first, second = tx.init(p)
    updates, _ = tx.update(p, (first, rate.set(second, learning_rate=0.25)), p)
    assert updates["w"] == -0.25


def test_under_multi_steps():
    """Two gradients to a step are one step with their mean."""

    def means(t):
        return jax.tree.map(lambda a, b: (a + b) / 2, gradients(2 * t), gradients(2 * t + 1))

    got = trajectory(optax.MultiSteps(ours(), 2).gradient_transformation(), 10)
    assert_close(jax.tree.map(lambda x: x[1::2], got), trajectory(ours(), 5, means))


def test_under_apply_if_finite():
    """Steps with a NaN leave parameters and state as they were."""
    bad = (1, 4)

    def grads(t):
        g = gradients(t)
        return {**g, "scale": g["scale"] + (jnp.nan if t in bad else 0.0)}

    got = trajectory(optax.apply_if_finite(ours(), 5), 6, grads)
    good = [t for t in range(6) if t not in bad]
    wanted = trajectory(ours(), 4, lambda t: gradients(good[t]))
    assert_close(jax.tree.map(lambda x: x[good], got), wanted)


def test_under_masked():
    """Masked parameters get their gradient back, and no slots."""
    tx: Any = optax.masked(ours(), KERNELS)
    state = tx.init(params())
    slots = state.inner_state["adam"]["m"]
    assert [x.shape for x in jax.tree.leaves(slots)] == [(8, 2)]
    updates, after = jax.jit(tx.update)(gradients(0), state, params())
    assert_close(updates["scale"], gradients(0)["scale"])
    assert jax.tree.structure(after) == jax.tree.structure(state)
    alone = {"kernel": params()["encoder"]["layer_0"]["kernel"]}
    g = {"kernel": gradients(0)["encoder"]["layer_0"]["kernel"]}
    wanted, _ = jax.jit(ours().update)(g, ours().init(alone), alone)
    assert_close(updates["encoder"]["layer_0"]["kernel"], wanted["kernel"])


def test_under_multi_transform():
    """Adam for the kernel, plain descent for the rest, each as if alone."""
    adam: Any = optim.AdamOptimizer(0.01)
    sgd: Any = optim.GradientDescentOptimizer(0.1)
    labels = {"encoder": {"layer_0": {"bias": "sgd", "kernel": "adam"}}, "scale": "sgd"}
    both = optax.multi_transform({"adam": adam, "sgd": sgd}, labels)
    wanted = jax.tree.map(
        lambda label, by_adam, by_sgd: by_adam if label == "adam" else by_sgd,
        labels,
        trajectory(adam),
        trajectory(sgd),
    )
    assert_close(trajectory(both), wanted)


def test_masked_node_in_the_users_tree():
    """A hole in the tree is no parameter: it comes back as it is."""
    p = {"kernel": jnp.ones((2, 2)), "hole": optax.MaskedNode()}
    tx = ours()
    updates, state = tx.update(p, tx.init(p), p)
    assert updates["hole"] == optax.MaskedNode()
    new, _ = tx.apply(p, state, p)
    assert jax.tree.structure(new) == jax.tree.structure(p)


def inputs():
    return random_like((16, 3), 1), random_like((16, 2), 2)


def test_inside_flax_train_state():
    x, y = inputs()
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), x)

    def loss(p):
        return jnp.mean((model.apply({"params": p}, x) - y) ** 2)

    def train(tx) -> Any:
        state = flax.training.train_state.TrainState.create(
            apply_fn=model.apply, params=variables["params"], tx=tx
        )
        step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
        for _ in range(10):
            state = step(state)
        return state

    ours, theirs = optim.AdamOptimizer(0.01, epsilon=1e-30), optax.adam(0.01, eps=1e-30)
    assert_close(train(ours).params, train(theirs).params)
    assert train(ours).opt_state["step"] == 10


class Model(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return self.dense(x)


def train_nnx(tx) -> tuple[Any, Any]:
    """Return the parameters and the optimizer's state after ten steps."""
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x, y = inputs()

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads, value=loss)

    for _ in range(10):
        step(model, optimizer)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), pure(optimizer.opt_state)


def pure(tree):
    """Return a tree with arrays in place of flax' variables."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    value = lambda leaf: leaf[...] if is_variable(leaf) else leaf
    return jax.tree.map(value, tree, is_leaf=is_variable)


def test_inside_nnx_optimizer():
    got, state = train_nnx(optim.AdamOptimizer(0.01, epsilon=1e-30))
    wanted, _ = train_nnx(optax.adam(0.01, eps=1e-30))
    assert_close(got, wanted)
    assert state["step"] == 10


def test_nnx_parameters_have_the_names_of_attributes():
    """And the loss reaches the link that reads it."""
    tx = T.chain(
        loss=T.AverageLoss(0.0),
        multiply=T.MultiplyGradients({"dense/kernel": 0.0}),
        rate=T.ScaleByLearningRate(1.0),
    )
    got, state = train_nnx(tx)
    first = nnx.to_pure_dict(nnx.state(Model(), nnx.Param))
    np.testing.assert_array_equal(got["dense"]["kernel"], first["dense"]["kernel"])
    assert not np.array_equal(got["dense"]["bias"], first["dense"]["bias"])
    assert state["loss"]["mean"] > 0
