#!/usr/bin/env bash
# optax.add_noise(eta, gamma, key).init puts the caller's own key array into the state, not a copy.
# A train step that donates its state then deletes the key of the caller: the next init gives a state
# with a deleted array, and the next use of the key elsewhere raises "Array has been deleted". One makes
# the optimizer once and starts two runs with it; no other part of the state belongs to the caller.
# Versions: optax 0.2.8, jax 0.10.2. Source: optax/transforms/_adding.py, init_fn of add_noise
# Instead: copy the state after init, jax.tree.map(jnp.copy, state), or give key=0 (an integer).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, optax

def key_after_step(copy):
    key = jax.random.key(0)
    tx = optax.add_noise(0.1, 0.5, key)
    step = jax.jit(lambda state, grads: tx.update(grads, state), donate_argnums=0)
    step(copy(tx.init(jnp.zeros(3))), jnp.ones(3))
    try:
        jax.random.normal(key)
        return "usable"
    except RuntimeError as error:
        return str(error).split(" with")[0]

seen = key_after_step(lambda state: state)
copied = key_after_step(lambda state: jax.tree.map(jnp.copy, state))
print("optax", optax.__version__)
print("expected: the caller's key is usable")
print("seen:    ", seen, "| with a copied state:", copied)
raise SystemExit(seen != "Array has been deleted" or copied != "usable")
EOF
