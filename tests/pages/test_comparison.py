"""What the README's table says of peers, with the versions that are installed.

torch is asked in the Python that `TORCH_PYTHON` names, if it is there.
"""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optimize_loss as ol

STEP = 1e-3
NAN = [1.0, float("nan"), 1.0]
IN_TORCH = """
import json, torch
def run(rule, dtype, grads):
    w = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[rule]([w], lr=1e-3)
    for g in grads:
        w.grad = torch.full_like(w, g)
        made.step()
    return w.detach().float().tolist()
print(json.dumps([run("adam", torch.float32, [1.0, float("nan"), 1.0]),
                  run("sgd", torch.bfloat16, [1.0] * 200)]))
"""


def with_ours(rule, dtype, grads):
    options: dict[str, Any] = {"skip": "nonfinite"}
    if dtype == jnp.bfloat16:  # what is rounded stochastically is right in the mean
        options = {"precision": ol.Precision("float32")}
    step = ol.optimize_loss(
        lambda p, g: jnp.sum(p["w"].astype(jnp.float32)) * g,
        learning_rate=STEP,
        optimizer={"sgd": ol.optimizers.SGD, "adam": ol.optimizers.Adam}[rule],
        **options,
    )
    state = step.init({"w": jnp.ones(4000, dtype)})
    state, _ = step.many(state, jnp.asarray(grads, jnp.float32))
    return state.params["w"]


def with_optax(rule, dtype, grads):
    tx = {"sgd": optax.sgd, "adam": optax.adam}[rule](STEP)
    w: Any = jnp.ones(4, dtype)
    state = tx.init(w)
    with jax.numpy_dtype_promotion("standard"):
        for g in grads:
            updates, state = tx.update(jnp.full_like(w, g), state, w)
            w = optax.apply_updates(w, updates)
    return w


def with_nnx(rule, dtype, grads):
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(4, dtype))

    model = Model()
    tx = {"sgd": optax.sgd, "adam": optax.adam}[rule](STEP)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for g in grads:
            like = jax.tree.map(lambda x, g=g: jnp.full_like(x, g), nnx.state(model, nnx.Param))
            optimizer.update(model, like)
    return model.w[...]


def with_keras(rule, dtype, grads):
    keras = pytest.importorskip("keras")
    w = keras.Variable(np.ones(4), dtype=jnp.dtype(dtype).name)
    made = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[rule](STEP)
    with jax.numpy_dtype_promotion("standard"):
        for g in grads:
            made.apply([jnp.full((4,), g, dtype)], [w])
    return w.value


PEERS = {"optax": with_optax, "flax": with_nnx, "keras": with_keras}


def in_float32(x):
    return np.asarray(jnp.asarray(x).astype(jnp.float32))


@pytest.mark.parametrize("peer", PEERS)
def test_a_gradient_that_is_nan_destroys_the_parameters_of_peers(peer):
    assert np.isnan(in_float32(PEERS[peer]("adam", jnp.float32, NAN))).all()


def test_and_leaves_no_trace_here():
    np.testing.assert_array_equal(
        with_ours("adam", jnp.float32, NAN), with_ours("adam", jnp.float32, [1.0, 1.0])
    )


@pytest.mark.parametrize("peer", PEERS)
def test_small_updates_of_16_bits_are_lost_by_peers(peer):
    assert (in_float32(PEERS[peer]("sgd", jnp.bfloat16, [1.0] * 200)) == 1).all()


def test_and_not_here():
    assert abs(in_float32(with_ours("sgd", jnp.bfloat16, [1.0] * 200)).mean() - 0.8) < 0.005


def test_a_name_that_matches_nothing_is_no_error_of_keras_and_optax():
    keras = pytest.importorskip("keras")
    keras.optimizers.AdamW(0.1).exclude_from_weight_decay(var_names=["biass"])
    masked = optax.add_decayed_weights(
        0.1, mask=lambda p: jax.tree_util.tree_map_with_path(lambda k, _: "biass" in str(k), p)
    )
    masked.init({"bias": jnp.ones(2)})
    rules = {"biass": {"weight_decay": 0}}
    step = ol.optimize_loss(lambda p: p["bias"], learning_rate=0.1, rules=rules)
    with pytest.raises(ValueError, match="biass"):
        step.init({"bias": 1.0})


def test_torch_does_as_the_other_peers():
    python = os.environ.get("TORCH_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", IN_TORCH], capture_output=True, text=True, check=False)
    if "No module named 'torch'" in done.stderr:
        pytest.skip("torch is not installed")
    after_nan, narrow = json.loads(done.stdout)
    assert np.isnan(after_nan).all()
    assert narrow == [1.0] * 4
