#!/usr/bin/env bash
# nnx.jit and repr of an nnx.Optimizer raise IndexError when the optimizer's transformation is a plain tuple subclass.
# optax only asks for `init` and `update`, and the Optimizer is built and updates without jit. But nnx
# takes each tuple instance for a tree, while jax takes only exact tuples and named tuples as trees, so
# nnx finds a leaf with an empty path and reads path[0].
# Versions: flax 0.12.8, jax 0.10.2, optax 0.2.8. No public report found.
# Instead: make the transformation a named tuple, such as optax.GradientTransformation(tx.init, tx.update).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 flax==0.12.8
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import flax, jax.numpy as jnp, optax
from flax import nnx

class Transform(tuple):
    init = property(lambda self: self[0])
    update = property(lambda self: self[1])

def loss(model):
    return jnp.sum(model(jnp.ones(2)) ** 2)

def step(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))

def outcome(tx, run):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    try:
        run(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
        return "works"
    except IndexError as error:
        return f"IndexError: {error}"

sgd = optax.sgd(0.1)
tx = Transform((sgd.init, sgd.update))
seen = outcome(tx, step), outcome(tx, nnx.jit(step)), outcome(sgd, nnx.jit(step))
print("flax", flax.__version__)
print("expected: works without jit, with jit, and with optax's own named tuple")
print("seen:    ", seen)
raise SystemExit(seen != ("works", "IndexError: tuple index out of range", "works"))
EOF
