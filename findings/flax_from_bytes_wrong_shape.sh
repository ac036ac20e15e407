#!/usr/bin/env bash
# flax.serialization.from_bytes(target, data) returns arrays of another shape and dtype than target's.
# The target is checked for its keys: a missing one raises. So one takes it for a check of the arrays
# as well, but a bias of shape (1,) loads into a model with 5 outputs. An error comes later, or never,
# when the shapes broadcast.
# Versions: flax 0.12.8, jax 0.10.2. Source: https://github.com/google/flax/issues/2436
# Instead: compare shape and dtype of both trees yourself (chex.assert_trees_all_equal_shapes_and_dtypes).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 flax==0.12.8
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import flax, numpy as np
from flax import serialization

target = {"bias": np.zeros(5, np.float32)}
seen = serialization.from_bytes(target, serialization.to_bytes({"bias": np.ones(1, np.int8)}))["bias"]
try:
    serialization.from_bytes(target, serialization.to_bytes({"other": np.ones(5, np.float32)}))
    keys = "not checked"
except ValueError:
    keys = "checked"
print("flax", flax.__version__)
print("expected: float32 (5,), or an error")
print("seen:    ", seen.dtype, seen.shape, "| keys:", keys)
raise SystemExit((seen.dtype.name, seen.shape, keys) != ("int8", (1,), "checked"))
EOF
