"""A chain and an optimizer where only one of optax's own transformations is taken."""

import copy
import pickle
from typing import Any

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optimize_loss as ol
from optimize_loss import optimizers as optim
from optimize_loss import transforms as T
from tests.optimizers.custom_optimizers import MomentumSGD


class Descent(optim.Optimizer):
    """Gradient descent that may keep the loss of the last step in its state."""

    learning_rate: T.NotNegative = 0.5
    keeps_loss: bool = False

    def links(self):
        kept = {"loss": T.AverageLoss(0.0)} if self.keeps_loss else {}
        return {**kept, "rate": T.ScaleByLearningRate(self.rate)}


def as_chain(keeps_loss=False):
    return T.chain(**Descent(keeps_loss=keeps_loss).links())


MADE = {
    "chain": as_chain,
    "optimizer": lambda loss=False: Descent(keeps_loss=loss),
    "multi": lambda loss=False: optim.MultiOptimizer({"w": Descent(keeps_loss=loss)}),
    "loss-scale": lambda loss=False: optim.LossScaleOptimizer(Descent(keeps_loss=loss), 1.0),
    "chain-in-chain": lambda loss=False: T.chain(inner=Descent(keeps_loss=loss)),
}
CUSTOM = {"own-links": Descent, "own-class": MomentumSGD, "of-keras": optim.Adam}

every = pytest.mark.parametrize("made", MADE)


def params():
    return {"w": jnp.ones(2)}


@pytest.fixture(autouse=True)
def as_optax_needs_it():
    """optax multiplies bools and integers by floats, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("made", [*MADE, *CUSTOM])
def test_a_client_that_asks_for_the_class_and_takes_the_functions(made):
    """As numpyro and gpjax do."""
    tx: Any = {**MADE, **CUSTOM}[made]()
    assert isinstance(tx, optax.GradientTransformation)
    init, update = tx
    updates: Any = update(params(), init(params()), params())[0]
    wanted: Any = tx.update(params(), tx.init(params()), params())[0]
    np.testing.assert_array_equal(updates["w"], wanted["w"])
    assert optax.with_extra_args_support(tx) is tx


@every
def test_a_named_tuple_of_two_functions(made):
    tx = MADE[made]()
    init, update = tx
    assert (tx[0], tx[1], tx[-1], len(tx)) == (init, update, update, 2)
    assert (tx.init, tx.update) == (init, update)
    assert update in tx
    assert 3 not in tx
    assert tx._asdict() == {"init": init, "update": update}


@every
def test_replacing_a_function_keeps_the_other(made):
    tx = MADE[made]()
    new = tx._replace(update=lambda updates, state, params=None, **extra: (updates, state))
    assert type(new) is optax.GradientTransformationExtraArgs
    state = new.init(params())
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params()))
    assert new.update(3, state)[0] == 3


def around_chain(tx):
    return optax.chain(optax.scale(1.0), tx), lambda state: state[1]


def around_ours(tx):
    return T.chain(scale=optax.scale(1.0), inner=tx), lambda state: state["inner"]


def around_multi_transform(tx):
    outer = optax.multi_transform({"only": tx}, {"w": "only"})
    return outer, lambda state: state.inner_states["only"].inner_state


def around_masked(tx):
    return optax.masked(tx, {"w": True}), lambda state: state.inner_state


def around_apply_if_finite(tx):
    return optax.apply_if_finite(tx, 2), lambda state: state.inner_state


def around_multi_steps(tx):
    return optax.MultiSteps(tx, 1), lambda state: state.inner_opt_state


def around_injected(tx):
    return optax.inject_hyperparams(lambda: tx)(), lambda state: state.inner_state


AROUND = [
    around_chain,
    around_ours,
    around_multi_transform,
    around_masked,
    around_apply_if_finite,
    around_multi_steps,
    around_injected,
]


@pytest.mark.parametrize("around", AROUND)
@every
def test_the_loss_comes_through(made, around):
    tx, inner = around(MADE[made](True))
    _, state = tx.update(params(), tx.init(params()), params(), value=jnp.float32(8.0))
    seen = inner(state)
    seen = seen["inner"] if made == "chain-in-chain" else seen
    (name,) = (name for name in seen if name.split(".")[-1] == "loss")
    assert seen[name]["mean"] == 8.0


@every
def test_in_the_train_states_of_flax(made):
    state: Any = flax.training.train_state.TrainState.create(
        apply_fn=None, params=params(), tx=MADE[made]()
    )
    state = jax.jit(lambda s: s.apply_gradients(grads=params()))(state)
    np.testing.assert_array_equal(state.params["w"], [0.5, 0.5])
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    optimizer = nnx.Optimizer(model, MADE[made](), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(model["w"][...], [0.5, 0.5])


@pytest.mark.parametrize("made", [*CUSTOM, "multi", "loss-scale"])
def test_an_optimizer_stays_an_object_with_attributes(made):
    """Equal to itself alone, and copied with its state."""
    make: Any = {**MADE, **CUSTOM}[made]
    optimizer, other = make(), make()
    optimizer.apply(params(), params())
    assert optimizer != other
    assert len({optimizer, other}) == 2
    for again in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(again) is type(optimizer)
        assert again != optimizer
        assert repr(again) == repr(optimizer)
        assert int(again.iterations) == 1
        if made != "own-class":
            assert again.get_config() == optimizer.get_config()


def test_a_chain_stays_a_value():
    tx = MADE["chain"]()
    assert hash(tx) == hash(MADE["chain"]())
    assert tx != T.chain(rate=T.ScaleByLearningRate(0.25))
    assert tx == MADE["chain"]()
    for again in (pickle.loads(pickle.dumps(tx)), copy.copy(tx), copy.deepcopy(tx)):
        assert again == tx


@every
def test_a_tree_has_it_in_its_structure(made):
    tx = MADE[made]()
    assert jax.tree.leaves({"tx": tx}) == []
    assert jax.tree.map(lambda x: x, {"tx": tx})["tx"] is tx


def test_a_program_with_an_optimizer_for_an_argument_sees_its_options():
    optimizer = Descent(0.5)
    update = jax.jit(lambda tx: tx.update(params(), tx.init(params()))[0]["w"])
    np.testing.assert_array_equal(update(optimizer), [-0.5, -0.5])
    optimizer.clipvalue = 0.5
    np.testing.assert_array_equal(update(optimizer), [-0.25, -0.25])
    optimizer.learning_rate = 0.25
    np.testing.assert_array_equal(update(optimizer), [-0.125, -0.125])


@pytest.mark.parametrize("made", [*MADE, *CUSTOM])
def test_its_class_gives_it_back_for_its_functions(made):
    """As Keras asks for it when it becomes an attribute of a model."""
    tx: Any = {**MADE, **CUSTOM}[made]()
    before = repr(tx)
    assert type(tx)(**tx._asdict()) is tx
    assert repr(tx) == before


@pytest.mark.parametrize("made", ["optimizer", "chain"])
def test_one_optimizer_trains_in_all_ways(made):
    """In a step of our own, as in optax's."""
    step = ol.optimize_loss(lambda p: jnp.sum(p["w"] ** 2) / 2, optimizer=MADE[made]())
    state, _ = step(step.init(params()))
    np.testing.assert_array_equal(state.params["w"], [0.5, 0.5])
