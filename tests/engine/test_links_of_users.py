"""Links that users write: what is unusual either works or is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss as ol
from optimize_loss import transforms as T
from optimize_loss._engine.link import by_entry
from optimize_loss._engine.plain import plain

RATE = {"rate": T.ScaleByLearningRate(1.0)}
P, G = {"w": jnp.array([2.0])}, {"w": jnp.array([1.0])}


@dataclasses.dataclass(frozen=True)
class Below(T.Gate):
    bound: T.Positive
    needs = "global_norm"

    def scalars(self, numbers, memory, total, step):
        return {"open": total < numbers["bound"]}, memory


@dataclasses.dataclass(frozen=True)
class Follow(T.TreeLink):
    def run(self, updates, slots, params, k):
        return updates, slots


@dataclasses.dataclass(frozen=True)
class MoveAndScale(T.Link):
    """Has a part before the update, and one that makes it."""

    def before(self, param, k):
        return jnp.ones_like(param)

    def leaf(self, update, slots, param, k):
        return 10 * update * param, slots


def test_a_link_may_move_a_parameter_and_change_its_update():
    tx = T.chain(both=MoveAndScale())
    state = tx.init(P)
    new, _ = tx.apply(G, state, P)
    np.testing.assert_array_equal(new["w"], [2 + 1 + 10 * 3])
    np.testing.assert_array_equal(plain(tx, G, state, P)[0]["w"], new["w"])


BEHIND = {
    "a-gate": {"below": Below(100.0)},
    "a-whole-tree": {"follow": T.ForParameters("x", Follow())},
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_an_average_stands_in_the_last_segment(behind):
    with pytest.raises(ValueError, match="The link 'ema' must come last"):
        T.chain(**RATE, ema=T.ForParameters("w", T.AverageParams(0.5)), **behind)


def test_optimize_loss_puts_the_average_last():
    optimizer = T.chain(**RATE, ema=T.AverageParams(0.5))
    step = ol.optimize_loss(lambda p: p["w"][0], optimizer=optimizer, skip="nonfinite")
    state, _ = step(step.init(P))
    np.testing.assert_array_equal(state.optimizer["ema"]["average"]["w"], [1.5])


class GateAndTree(T.Gate, T.TreeLink):
    pass


class AfterGate(T.Gate):
    def after(self, param, moved, slots, k):
        return moved, slots


class AfterAndLeaf(T.Link):
    def leaf(self, update, slots, param, k):
        return update, slots

    def after(self, param, moved, slots, k):
        return moved, slots


@pytest.mark.parametrize(
    "link", [GateAndTree(), AfterGate(), AfterAndLeaf()], ids=lambda x: type(x).__name__
)
def test_functions_that_would_never_run_are_refused(link):
    with pytest.raises(ol.InvalidType, match="The link 'odd' must"):
        T.chain(odd=link)


def test_what_a_link_needs_is_known():
    class Needs(T.Link):
        needs = "global_nrom"

    tx = T.chain(odd=Needs())
    with pytest.raises(ol.InvalidType, match="`needs` of the link 'odd' must be one of"):
        tx.update(G, tx.init(P), P)


def test_a_function_of_a_class_that_is_no_link_counts():
    class ByItsSum:
        def leaf(self, update, slots, param, k):
            return update / jnp.sum(update), slots

    @dataclasses.dataclass(frozen=True)
    class Mixed(ByItsSum, T.ScaleByLearningRate):
        pass

    assert by_entry(T.ScaleByLearningRate)
    assert not by_entry(Mixed)


def test_a_norm_behind_a_link_that_overrides_its_factor_is_right():
    @dataclasses.dataclass(frozen=True)
    class Signs(T.ScaleByLearningRate):
        def leaf(self, update, slots, param, k):
            return jnp.sign(update), slots

    tx, g = T.chain(signs=Signs(1.0), seen=T.ObserveNorm()), {"w": jnp.full(4, 3.0)}
    assert tx.update(g, tx.init(g))[1]["seen"]["norm"] == 2


def test_a_running_mean_of_norms_does_not_see_empty_batches():
    @dataclasses.dataclass(frozen=True)
    class Mean(T.Link):
        needs = "global_norm"

        def memory(self):
            return {"mean": 1.0}

        def scalars(self, numbers, memory, total, step):
            return {}, {"mean": (memory["mean"] + total) / 2}

    tx = T.chain(mean=Mean(), accumulate=T.Accumulate(2, "weighted"), **RATE)
    bad = {"w": jnp.array([jnp.nan])}
    _, state = tx.update(bad, tx.init(P), P, weight=jnp.float32(0))
    assert state["mean"]["mean"] == 1


def test_batches_are_weighed_once():
    with pytest.raises(ValueError, match="The link 'b' weights batches"):
        T.chain(a=T.Accumulate(2), b=T.Accumulate(2, "weighted"), **RATE)


def test_a_scale_of_all_rates_is_for_all_parameters():
    with pytest.raises(ol.InvalidType, match="no loss scale, nor one of rates"):
        T.ForParameters("w", T.ReduceOnPlateau())


def test_fields_that_hold_several_floats_are_no_numbers():
    @dataclasses.dataclass(frozen=True)
    class Betas(T.Link):
        betas: tuple[float, float] = (0.9, 0.99)

    assert Betas().numbers() == {}


@pytest.mark.parametrize("name", ["learning_rate", "step", "w"])
def test_a_rule_may_be_for_a_parameter_of_any_name(name):
    """A decay of 1/2 at the rate 1/10, and noise of 1/1000, whatever the parameter is called."""
    params = {name: jnp.full(1000, 2.0)}
    rules = {name: {"weight_decay": 0.5}}
    zero = lambda p: sum(jnp.sum(0 * x) for x in jax.tree.leaves(p))
    step = ol.optimize_loss(zero, learning_rate=0.1, optimizer="SGD", rules=rules)
    np.testing.assert_allclose(step(step.init(params))[0].params[name], 1.9, rtol=1e-6)
    rules = {name: {"noise_scale": 1e-3}}
    step = ol.optimize_loss(zero, learning_rate=1.0, optimizer="SGD", rules=rules)
    state = step.init(params)
    for _ in range(2):
        old = np.array(state.params[name])
        state, _ = step(state)
        assert 5e-4 < np.std(state.params[name] - old) < 1.5e-3


def test_owners_are_found_once(monkeypatch):
    """Tracing takes time in proportion to the number of leaves."""
    from optimize_loss._engine.trees import Params

    found, owners = [], vars(Params)["owners"]
    counted = property(lambda p: found.append(1) or owners.func(p))
    monkeypatch.setattr(Params, "owners", counted)
    tx, p = T.chain(adam=T.ScaleByAdam(), **RATE), {str(i): jnp.zeros(()) for i in range(20)}
    jax.eval_shape(tx.update, p, tx.init(p), p)
    assert len(found) <= 2


def test_a_link_can_see_the_parameter_as_it_is_stored():
    @dataclasses.dataclass(frozen=True)
    class ToOne(T.Link):
        needs = "stored_param"

        def leaf(self, update, slots, param, k):
            assert (k["stored"].dtype, param.dtype) == (jnp.bfloat16, jnp.float32)
            return 1 - k["stored"].astype(param.dtype), slots

    p = {"w": jnp.full(2, 3.0, jnp.bfloat16)}
    tx = T.chain(one=ToOne(), **RATE)
    new, _ = tx.apply(p, tx.init(p), p)
    np.testing.assert_array_equal(new["w"].astype(jnp.float32), [5, 5])
