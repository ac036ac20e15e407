#!/usr/bin/env bash
# optax.clip_by_global_norm turns ordinary float16 gradients into zeros.
# The norm is computed in float16: 300**2 is above the largest float16 (65504), so the norm is inf and
# g / inf * max_norm is 0. Training stops without a NaN or a warning. 300 is far from the limit of
# float16, and loss scaling makes such gradients on purpose.
# Versions: optax 0.2.8, jax 0.10.2. No public report found for optax.
# Instead: cast the gradients to float32 before you clip.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, optax

def clip(dtype):
    grads = jnp.full(3, 300, dtype)
    tx = optax.clip_by_global_norm(1.0)
    return tx.update(grads, tx.init(grads))[0]

half, single = clip(jnp.float16), clip(jnp.float32)
print("optax", optax.__version__)
print("expected:", single)
print("seen:    ", half)
raise SystemExit(not (jnp.all(half == 0) and jnp.allclose(single, 3**-0.5)))
EOF
