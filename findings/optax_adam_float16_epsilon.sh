#!/usr/bin/env bash
# optax.adam with its default eps gives NaN for a zero gradient in float16, and -inf for a small one.
# eps=1e-8 is below the smallest float16 and is added in float16, where it is 0: the update is 0 / 0.
# The job of eps is to prevent just that. A gradient of 1e-4 has a square that is 0 in float16.
# Versions: optax 0.2.8, jax 0.10.2. Source: https://github.com/google-deepmind/optax/issues/1754
# Instead: optax.adam(..., eps=1e-4) for float16, or float32 params and state.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, optax

def update(gradient, **options):
    params = jnp.ones(2, jnp.float16)
    tx = optax.adam(1e-3, **options)
    return tx.update(jnp.full_like(params, gradient), tx.init(params), params)[0]

zero, small, fixed = update(0), update(1e-4), update(0, eps=1e-4)
print("optax", optax.__version__)
print("expected: [0. 0.] for a zero gradient, about [-0.001 -0.001] for a small one")
print("seen:    ", zero, small, "| with eps=1e-4:", fixed)
raise SystemExit(not (jnp.all(jnp.isnan(zero)) and jnp.all(small == -jnp.inf) and jnp.all(fixed == 0)))
EOF
