"""Small parameters in one array: what a step costs, in things that can be counted."""

import re

import jax
import jax.numpy as jnp
import pytest

import optimize_loss as ol
from tests.engine.packed import buckets_in

# What a step costs, in things that can be counted.


def layers(count):
    return {f"l{i:03}": {"w": jnp.eye(8), "b": jnp.zeros((1, 8))} for i in range(count // 2)}


def network(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.sum(x * x)


def counted(leaves, bucket):
    """Return the arguments of a compiled step, the kernels beyond the loss, and its temporaries."""
    params, x = layers(leaves), jnp.ones((4, 8))
    step = ol.optimize_loss(network, learning_rate=0.1, clip_gradients=1.0, bucket=bucket)
    program = step.lower(step.init(params), x).compile()
    text = program.as_text()
    assert text is not None
    entry = text[text.index("\nENTRY") :]
    kernels = len(re.findall(r" fusion\(", entry))
    whole = len(re.findall(r" concatenate\(", entry))
    memory = program.memory_analysis()
    assert memory is not None
    return len(re.findall(r" parameter\(", entry)), kernels, whole, memory.temp_size_in_bytes


@pytest.mark.slow
def test_a_small_leaf_adds_no_argument_and_no_pass_of_the_update():
    (args, kernels, whole, temporary), (args_2, kernels_2, _, _) = (
        counted(n, "auto") for n in (20, 40)
    )
    assert args == args_2 <= 12
    assert whole == 1
    plain_args, plain, _, plain_temporary = counted(40, None)
    assert plain_args > 3 * 40
    x = jnp.ones((4, 8))
    loss_kernels = [
        len(
            re.findall(
                r" fusion\(",
                jax.jit(jax.value_and_grad(network)).lower(layers(n), x).compile().as_text() or "",
            )
        )
        for n in (20, 40)
    ]
    # What 20 leaves more cost is what the loss itself costs, not 3 or more passes for each.
    per_leaf = ((kernels_2 - kernels) - (loss_kernels[1] - loss_kernels[0])) / 20
    assert per_leaf <= 0.6  # every other leaf is a matrix, which its product wants by itself
    assert kernels_2 < 0.6 * plain
    assert temporary <= plain_temporary


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: 0.5 * jnp.sum((jnp.concatenate([v.ravel() for v in p.values()]) - x) ** 2),
        lambda p, x: sum(jnp.sum(jnp.sin(v * x)) for v in p.values()),
    ],
    ids=["as-one-vector", "each-by-itself"],
)
def test_a_small_leaf_that_the_loss_reads_adds_no_kernel_but_the_loss_own(loss):
    def kernels(program, *arguments):
        return len(re.findall(r" fusion\(", program.lower(*arguments).compile().as_text() or ""))

    def added(leaves):
        params = {f"p{i:03}": jnp.ones(8) for i in range(leaves)}
        step = ol.optimize_loss(loss, learning_rate=0.1, clip_gradients=1.0)
        of_loss = kernels(jax.jit(jax.value_and_grad(loss)), params, 1.0)
        return kernels(step, step.init(params), 1.0) - of_loss

    assert added(40) <= added(20)


def test_unpacking_outside_of_a_step_is_one_program():
    params = {f"seen only here/{name}": x for name, x in layers(40).items()}
    step = ol.optimize_loss(lambda p: sum(jnp.sum(x) for x in p.values()), learning_rate=1.0)
    state = step.init(params)
    (bucket,) = buckets_in(state)
    jax.block_until_ready(state.params)
    compiled = []

    def listen(event, *_, **__):
        compiled.append(event) if "jaxpr_to_mlir" in event else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(state.optimizer)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(jax.tree.leaves(state.optimizer["adam"]["m"])) == 40
    # That of the numbers at most; m and v are taken apart by the program that did the parameters.
    assert len(compiled) <= 1
    assert bucket.buffer.size == 20 * 72
