"""A call of a step: what it may take of the caller's memory, and what a batch may be."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimize_loss

ol: Any = optimize_loss
HAS_TORCH = importlib.util.find_spec("torch") is not None


def linear(**options):
    """A step that subtracts x from each entry of w."""
    options = {"learning_rate": 1.0, "optimizer": "SGD"} | options
    return ol.optimize_loss(lambda p, x: (p["w"] * x.astype(jnp.float32)).sum(), **options)


def start(step, size=3):
    return step.init({"w": np.zeros(size, np.float32)})


# --- inside transformations, the caller's memory stays the caller's

TRACED = {
    "vmap-batch": (
        lambda step, s: jax.vmap(lambda x: step(s, x)[0].params["w"])(jnp.ones((2, 3))),
        -np.ones((2, 3)),
    ),
    "vmap-state-none": (
        lambda step, s: jax.vmap(step, in_axes=(None, 0))(s, jnp.ones((2, 3)))[0].params["w"],
        -np.ones((2, 3)),
    ),
    "vmap-rate": (
        lambda step, s: jax.vmap(
            lambda r: step(s.set(learning_rate=r), np.ones(3, np.float32))[0].params["w"]
        )(jnp.arange(2.0)),
        -np.arange(2.0)[:, None] * np.ones(3),
    ),
    "grad-batch": (
        lambda step, s: jax.grad(lambda x: step(s, x)[0].params["w"].sum())(jnp.ones(3)),
        -np.ones(3),
    ),
    "jit-batch": (
        lambda step, s: jax.jit(lambda x: step(s, x)[0].params["w"])(jnp.ones(3)),
        -np.ones(3),
    ),
    "many-vmap": (
        lambda step, s: jax.vmap(lambda x: step.many(s, x)[0].params["w"])(jnp.ones((2, 4, 3))),
        np.full((2, 3), -4.0),
    ),
    "many-grad": (
        lambda step, s: jax.grad(lambda x: step.many(s, x)[0].params["w"].sum())(jnp.ones((2, 3))),
        -np.ones((2, 3)),
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_traced_argument_leaves_the_state_alive(name):
    call, wanted = TRACED[name]
    step = linear()
    state = start(step)
    np.testing.assert_array_equal(call(step, state), wanted)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(step(state, np.ones(3, np.float32))[0].params["w"], -np.ones(3))
    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_searches_refuse_batches_that_are_traced():
    step = linear()
    state = start(step)
    with pytest.raises(
        ol.InvalidType, match=r"`batches` must not be traced.*`sweep` returns numpy"
    ):
        jax.jit(lambda x: step.sweep(state, x, learning_rate=[1.0]).losses)(jnp.ones((2, 3)))
    with pytest.raises(ol.InvalidType, match=r"`batches` must not be traced.*`find_learning_rate`"):
        jax.jit(lambda x: step.find_learning_rate(state, [x]).losses)(jnp.ones(3))


# --- one program, and arrays that are in the state and in the batch


def test_a_compiled_program_is_called_as_the_step_is():
    step = linear()
    state, x = start(step), np.ones(3, np.float32)
    state, metrics = step.lower(state, x).compile()(state, x)
    assert (metrics["loss"], state.params["w"].tolist()) == (0, [-1, -1, -1])
    with pytest.raises(ol.InvalidType, match="`state` must be a TrainState"):
        step.lower({"w": x}, x)


@pytest.mark.parametrize("call", ["__call__", "many", "run"])
def test_an_array_of_the_state_is_no_batch(call):
    step = linear(bucket=None)
    state = step.init({"w": np.ones(3, np.float32)})
    x = jax.device_put(state.params["w"])
    with pytest.raises(ValueError, match=r"must not hold an array of the state.*`jnp.copy\("):
        getattr(step, call)(state, [x] if call == "run" else x)
    state, _ = step(state, jnp.copy(x))
    np.testing.assert_array_equal(state.params["w"], np.zeros(x.shape))


# --- one batch is not a stack of batches


def test_one_batch_is_not_taken_for_a_stack_of_its_examples():
    step = linear()
    state, _ = step(start(step), np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"must be stacked.*`step\(state, \*batch\)`.*\(3,\)"):
        step.many(state, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="must be stacked"):
        step.sweep(state, np.ones(3, np.float32), learning_rate=[0.1])
    state, _ = step.many(state, np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(state.params["w"], np.full(3, -3.0))


def test_a_run_over_batches_of_several_ranks_stacks_what_is_alike():
    step = linear()
    batches = [np.ones((1, 3), np.float32), *[np.ones(3, np.float32)] * 2]
    state, _ = step.run(start(step), [x.sum(0) if x.ndim > 1 else x for x in batches])
    state, _ = step.run(start(step), [batches[0][0], batches[0][0]], steps_per_call=2)
    np.testing.assert_array_equal(state.params["w"], np.full(3, -2.0))


# --- tensors


class Tensor:
    """What a tensor of torch has in common with an array, and what it refuses to numpy."""

    def __init__(self, value, dtype="float32", grad=False, on="cpu"):
        self.value = np.asarray(value, np.float32)
        self.dtype, self.grad, self.on = f"torch.{dtype}", grad, on
        self.shape, self.ndim = self.value.shape, self.value.ndim

    def detach(self):
        return Tensor(self.value, self.dtype[6:], False, self.on)

    def cpu(self):
        return Tensor(self.value, self.dtype[6:], self.grad, "cpu")

    def float(self):
        return Tensor(self.value, "float32", self.grad, self.on)

    def __array__(self, dtype=None):
        if self.grad or self.on != "cpu":
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.value


def of_torch(value, dtype="float32", grad=False, on="cpu"):
    torch = pytest.importorskip("torch")
    return torch.tensor(value, dtype=getattr(torch, dtype), device=on, requires_grad=grad)


TENSORS = {
    "plain": {},
    "grad": {"grad": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-grad": {"dtype": "bfloat16", "grad": True},
}


@pytest.mark.parametrize("make", [Tensor, of_torch])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_batches_everywhere(name, make):
    tensor = functools.partial(make, **TENSORS[name])
    seen = []

    def loss(params, x):
        seen.append(str(x.dtype))
        return (params["w"] * x.astype(jnp.float32)).sum()

    step = ol.optimize_loss(loss, learning_rate=1.0, optimizer="SGD")
    one, two = [1.0, 2.0, 3.0], [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
    state, _ = step(start(step), tensor(one))
    state, _ = step.many(state, tensor(two))
    for steps_per_call in (1, 2):
        state, _ = step.run(state, [tensor(one)] * 2, steps_per_call=steps_per_call)
    np.testing.assert_array_equal(state.params["w"], [-7, -13, -19])
    assert step.sweep(state, tensor(two), learning_rate=[0.1]).losses.shape == (1, 2)
    step.lower(state, tensor(one))
    assert set(seen) == {TENSORS[name].get("dtype", "float32")}


def test_a_tensor_of_another_device_is_copied():
    step = linear()
    state, _ = step(start(step), Tensor([1.0, 2.0, 3.0], on="cuda"))
    np.testing.assert_array_equal(state.params["w"], [-1, -2, -3])


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_a_tensor_that_is_no_array_is_refused():
    sparse = of_torch([1.0, 0.0, 2.0]).to_sparse()
    step = linear()
    with pytest.raises(ol.InvalidType, match=r"`batch` must be arrays and numbers.*Tensor"):
        step(start(step), sparse)


# --- keys


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["alone", "accumulate"])
def test_a_loss_is_called_twice_with_one_key_on_purpose(options):
    def loss(params, x, *, key):
        return (params["w"] * (x + jax.random.normal(key, x.shape))).sum()

    losses = []
    for checked in (False, True):
        with jax.debug_key_reuse(checked):
            step = ol.optimize_loss(loss, learning_rate=0.1, sam=0.05, **options)
            batch = np.ones((2, 3), np.float32)
            losses.append(step.many(start(step), batch)[1]["loss"].tolist())
            step.sweep(start(step), batch, learning_rate=[0.1], seeds=2)
    assert losses[0] == losses[1]
