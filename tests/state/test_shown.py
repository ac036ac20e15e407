"""States and chains as text: `repr`, and in notebooks."""

import jax
import jax.numpy as jnp
import pytest

import optimize_loss as ol

T = ol.transforms
PARAMS = {"dense": {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3))}}


def squares(params):
    return sum(jnp.sum(p * p) for p in jax.tree.leaves(params))


def made(**options):
    return ol.optimize_loss(squares, optimizer="SGD", **options)


def test_a_state_shows_its_step_its_parameters_and_its_links():
    def loss(params, *, model_state, key):
        return squares(params), ol.Aux(model_state=model_state)

    chain = T.chain(
        clip=T.ClipByGlobalNorm(1.0),
        adam=T.ScaleByAdam(beta_1=0.75),
        rate=T.ScaleByLearningRate(lambda step: 0.1),
    )
    step = ol.optimize_loss(loss, optimizer=chain)
    state, _ = step(step.init(PARAMS, model_state=jnp.ones(4)).set(max_norm=2.0))
    lines = repr(state).splitlines()
    assert lines[:7] == [
        "TrainState at step 1:",
        "params: 2, 9 entries",
        "  dense/bias    float32[3]",
        "  dense/kernel  float32[2,3]",
        "model_state: 1, 4 entries",
        "key: 1, 1 entries",
        "links, in order:",
    ]
    assert "  clip: ClipByGlobalNorm(max_norm=2)" in lines
    assert "  adam: ScaleByAdam(beta_1=0.75, beta_2=0.999, epsilon=1e-08)" in lines
    assert "  rate: ScaleByLearningRate(learning_rate=schedule)" in lines


@pytest.mark.parametrize("bucket", [None, 4096])
def test_a_state_of_many_parameters_fits_on_a_screen(bucket):
    step = made(learning_rate=0.1, bucket=bucket)
    text = repr(step.init({f"p{i:02}": jnp.ones(i) for i in range(25)}))
    assert len(text.splitlines()) < 30
    assert "  … and 6 more" in text


def test_a_state_without_values_shows_its_shapes():
    step = made(learning_rate=0.1)
    state = step.init(PARAMS)
    step(state)
    assert repr(state).startswith("TrainState that was donated to a step:\nparams: 2, 9")
    shapes = jax.eval_shape(step.init, PARAMS)
    assert repr(shapes).startswith("TrainState without values:\nparams: 2, 9 entries\n")
    assert "learning_rate=0.1" in repr(shapes)
    assert repr(jax.tree.map(lambda _: None, shapes)).startswith("TrainState without values:")
    seen = []
    jax.jit(lambda state: seen.append(repr(state)))(step.init(PARAMS))
    assert seen == [repr(shapes)]


def test_several_states_show_the_shapes_of_their_numbers():
    state = made(learning_rate=0.1).init(PARAMS)
    states = jax.vmap(lambda rate: state.set(learning_rate=rate))(jnp.arange(3.0))
    assert "TrainState at step int32[3]:" in repr(states)
    assert "learning_rate=float32[3]" in repr(states)


# treescope uses a class that numpy 2.5 deprecates.
@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")
def test_treescope_shows_what_a_chain_and_a_state_are():
    treescope = pytest.importorskip("treescope")
    step = made(learning_rate=0.25)
    text = treescope.render_to_text(step.chain)
    assert "bound method" not in text
    assert "rate=ScaleByLearningRate(learning_rate=0.25)" in text
    state = step.init(PARAMS)
    assert treescope.render_to_text(state) == repr(state)
