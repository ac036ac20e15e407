"""Optimizers around optimizers: one counter, one rate, and no option without effect."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol

HALVED = ol.schedules.ExponentialDecay(1.0, 1, 0.5)


def trained(optimizer, steps=3):
    params = {"a": jnp.float32(8.0), "b": jnp.float32(8.0)}
    for _ in range(steps):
        params = optimizer.apply(params, params)
    return params


def test_a_schedule_inside_moves_with_the_updates():
    plain = ol.optimizers.SGD(HALVED)
    wrapped = ol.optimizers.LossScaleOptimizer(ol.optimizers.SGD(HALVED), 1.0)
    several = ol.optimizers.MultiOptimizer({"**": ol.optimizers.SGD(HALVED)})
    for optimizer in (plain, wrapped, several):
        trained(optimizer)
    rates = [plain.learning_rate, wrapped.learning_rate, several.optimizers["**"].learning_rate]
    np.testing.assert_array_equal(rates, 0.25)
    counters = [plain, wrapped, wrapped.inner_optimizer, several, several.optimizers["**"]]
    assert [int(x.iterations) for x in counters] == [3] * 5


def test_updates_counted_before_it_was_wrapped_count():
    inner = ol.optimizers.Adam()
    inner.iterations = 7
    assert ol.optimizers.LossScaleOptimizer(inner).iterations == 7


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda sgd: ol.optimizers.LossScaleOptimizer(sgd(axis_name="d")), "`axis_name`"),
        (lambda sgd: ol.optimizers.LossScaleOptimizer(sgd(loss_scale_factor=2.0)), "loss_scale"),
        (lambda sgd: ol.optimizers.LossScaleOptimizer(sgd(), clipnorm=1.0), "`clipnorm`"),
        (lambda sgd: ol.optimizers.MultiOptimizer({"a": sgd(axis_name="d")}), "`axis_name`"),
        (
            lambda sgd: ol.optimizers.MultiOptimizer({"a": sgd(gradient_accumulation_steps=2)}),
            "`gradient_accumulation_steps`",
        ),
        (
            lambda sgd: ol.optimizers.MultiOptimizer({"a": sgd(loss_scale_factor=2.0)}),
            "`loss_scale_factor`",
        ),
        (
            lambda sgd: ol.optimizers.MultiOptimizer({"a": sgd()}, weight_decay=0.1),
            "`weight_decay`",
        ),
        (
            lambda sgd: ol.optimizers.MultiOptimizer(
                {"a": ol.optimizers.MultiOptimizer({"**": sgd()})}
            ),
            "no wrapper",
        ),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make(lambda **options: ol.optimizers.SGD(0.1, **options))


def test_the_optimizers_inside_cannot_be_exchanged():
    several = ol.optimizers.MultiOptimizer({"a": ol.optimizers.SGD(0.1)}, ol.optimizers.Adam())
    given: object = several.optimizers
    with pytest.raises(TypeError):
        given["a"] = ol.optimizers.SGD(5.0)  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_alike(copied):
    several = ol.optimizers.MultiOptimizer(
        {"a": ol.optimizers.SGD(0.1, momentum=0.9)}, ol.optimizers.Adam(0.1)
    )
    params = trained(several)
    other = copied(several)
    first, second = several.apply(params, params), other.apply(params, params)
    assert jax.tree.map(float, first) == jax.tree.map(float, second)
    assert other.iterations == 4 == other.optimizers["a"].iterations


def test_muon_trains_matrices_alone():
    params = {"w": jnp.ones((2, 3))}
    new = ol.optimizers.Muon(0.1).apply({"w": jnp.ones((2, 3))}, params)
    assert new["w"].shape == (2, 3)
    assert (new["w"] < 1).all()


def test_pairs_the_wrong_way_round_are_an_error():
    v = ol.Variable(1.0)
    with pytest.raises(ol.InvalidType, match="other way round"):
        ol.optimizers.SGD(0.1).apply_gradients(zip([v], [jnp.array(1.0)], strict=True))
    assert v == 1.0


def test_an_integer_variable_has_no_gradient():
    v, n = ol.Variable(3.0), ol.Variable(2)
    (first, _), (second, _) = ol.optimizers.SGD(0.1).compute_gradients(lambda: 2 * v, [v, n])
    assert first == 2.0
    assert second is None


def test_bfloat16_state_survives_a_numpy_file(tmp_path):
    class Half(ol.optimizers.Optimizer):
        def __init__(self):
            super().__init__(learning_rate=0.5)

        def build(self, var_list):
            super().build(var_list)
            self.total = self.add_variable((2,), "bfloat16", "ones", "total")

        def update_step(self, gradient, variable):
            self.total.assign_add(gradient)
            variable.assign_sub(self.learning_rate * gradient)

    optimizers = [Half(), Half()]
    v = ol.Variable([1.0, 2.0])
    optimizers[0].apply_gradients([(jnp.ones(2), v)])
    store: dict[str, np.ndarray] = {}
    optimizers[0].save_own_variables(store)
    np.savez(tmp_path / "state.npz", **store)  # pyright: ignore[reportArgumentType]
    optimizers[1].build([v])
    optimizers[1].load_own_variables(dict(np.load(tmp_path / "state.npz")))
    assert (optimizers[1].total == jnp.full(2, 2, jnp.bfloat16)).all()
