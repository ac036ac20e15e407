#!/usr/bin/env bash
# optax.inject_hyperparams(optax.adam) gives NaN at the first step with bfloat16 params; optax.adam does not.
# The wrapper stores every hyperparameter in the dtype of the params. b2 = 0.999 is 1 in bfloat16, so
# the bias correction 1 - b2**t is 0, and 0 / 0 is NaN. The wrapper is meant to expose the
# learning rate, and one does not expect it to change b2.
# Versions: optax 0.2.8, jax 0.10.2. Source: https://github.com/google-deepmind/optax/issues/1414
# Instead: inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, optax

params = jnp.ones(2, jnp.bfloat16)

def first_update(tx):
    return tx.update(params, tx.init(params), params)[0]

plain = first_update(optax.adam(1e-3))
seen = first_update(optax.inject_hyperparams(optax.adam)(1e-3))
fixed = first_update(optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(1e-3))
print("optax", optax.__version__)
print("expected:", plain)
print("seen:    ", seen, "with hyperparam_dtype=float32:", fixed)
close = [bool(jnp.allclose(u.astype(float), -1e-3, rtol=0.01)) for u in (plain, fixed)]
raise SystemExit(not (jnp.all(jnp.isnan(seen)) and all(close)))
EOF
