"""A batch with a weight of 0 has nothing in it: whatever comes with it is not looked at."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol

T: Any = ol.transforms
EMPTY = [0, 0]


def mean_of_rows(params, x):
    """The mean over the rows that are not 0; 0/0 where there are none."""
    rows = jnp.sum(x != 0).astype(x.dtype)
    return params["w"] * jnp.sum(x) / rows, ol.Aux(weight=rows)


def trained(batches, every, loss=mean_of_rows, model_state=None, **options):
    step = ol.optimize_loss(
        loss,
        learning_rate=1.0,
        optimizer="SGD",
        accumulate=T.Accumulate(every, "weighted"),
        **options,
    )
    first = step.init({"w": 4.0}, model_state=model_state)
    return step.many(first, np.array(batches, np.float32))


GATES: dict[str, dict[str, Any]] = {
    "skip": {"skip": "nonfinite"},
    "spike": {"skip": ol.Spike(warmup_steps=1)},
    "scale": {"loss_scale": T.DivideByDynamicLossScale(4.0, 100)},
    "both": {"skip": "nonfinite", "loss_scale": T.DivideByDynamicLossScale(4.0, 100)},
}


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_gates_let_an_empty_batch_through(options, at):
    """Rows of 1, 3, 1, 1, 2 and 1 have a mean of 3/2, wherever the empty batch comes."""
    batches = [[1, 3], [1, 1], [2, 1]]
    state, metrics = trained([*batches[:at], EMPTY, *batches[at:]], 4, **options)
    assert (state.params["w"], state.step) == (2.5, 1)
    assert metrics.get("skipped", np.zeros(1))[-1] == 0
    assert metrics.get("loss_scale", np.full(1, 4.0))[-1] == 4
    assert np.isnan(metrics["loss"][at])


def test_running_means_in_front_do_not_see_it():
    batches = [[1, 1], [1, 1]]
    same, _ = trained(batches, 2, skip=ol.Spike())
    state, _ = trained([batches[0], EMPTY, batches[1]], 3, skip=ol.Spike())
    for key in ("mean", "sq_mean", "seen", "skipped"):
        assert state.optimizer["skip"][key] == same.optimizer["skip"][key]
    assert state.optimizer["skip"]["seen"] == 2


def test_a_batch_that_is_not_empty_is_still_left_out():
    state, metrics = trained([[1, 3], [np.nan, 1], EMPTY, [1, 3]], 2, skip="nonfinite")
    assert metrics["skipped"].tolist() == [0, 1, 1, 1]
    assert metrics["skipped_in_a_row"].tolist() == [0, 1, 1, 0]
    assert (state.params["w"], state.step) == (2, 1)


@pytest.mark.parametrize("skip", [None, "nonfinite"])
def test_the_model_state_of_an_empty_batch_is_not_kept(skip):
    def loss(params, x, *, model_state):
        value, aux = mean_of_rows(params, x)
        return value, ol.Aux(weight=aux.weight, model_state=model_state + jnp.sum(x) / aux.weight)

    state, _ = trained([[1, 3], EMPTY], 2, loss, model_state=jnp.zeros(()), skip=skip)
    assert (state.model_state, state.params["w"]) == (2, 2)


@pytest.mark.parametrize("first", [1, 2])
def test_a_plateau_does_not_count_updates_of_nothing(first):
    """A loss of 0 in their place would be the best for ever, and the rate fall at each update."""
    windows = [EMPTY] * (2 * first) + [[1, 1]] * 2 + [EMPTY] * 2 + [[1, 1]] * 2
    plateau = T.ReduceOnPlateau(0.5, patience=0)
    state, metrics = trained(windows, 2, plateau=plateau, moving_average_decay=0.5)
    assert metrics["plateau_scale"].tolist() == [1] * len(windows)
    assert (state.optimizer["plateau"]["best"], state.step) == (3, first + 3)
    assert metrics["loss/mean"][-1] == (4 / 2 + 3) / 2


def test_optax_sees_nan_where_there_was_no_loss_yet():
    import optax

    def update(updates, state, params=None, *, value=None, **_):
        return updates, value

    function: Any = update
    seen = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), function)
    tx = T.chain(gather=T.Accumulate(1, "weighted"), seen=seen)
    w = {"w": jnp.float32(1)}
    state, found = tx.init(w), []
    for loss, weight in [(np.nan, 0), (5, 1), (np.nan, 0)]:
        _, state = tx.update(w, state, w, value=jnp.float32(loss), weight=jnp.float32(weight))
        found.append(float(state["seen"]))
    np.testing.assert_array_equal(found, [np.nan, 5, 5])
