#!/usr/bin/env bash
# eqx.tree_deserialise_leaves puts saved leaves into each other's places after a harmless rename or reorder.
# The file has no names: leaves are read back in the order of `like`. Swap two fields of a Module, or
# rename the keys layer_9 and layer_10 to layer_09 and layer_10 (dicts are sorted), and equal shapes
# load without an error into the wrong parameters. Shapes are checked, so one trusts the check.
# Versions: equinox 0.13.8, jax 0.10.2. Source: its docstring asks for "a PyTree of same structure".
# Instead: save the paths too (jax.tree_util.tree_flatten_with_path) and compare them when you load.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 equinox==0.13.8
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import io
import equinox as eqx, jax, jax.numpy as jnp

class Before(eqx.Module):
    mean: jax.Array
    scale: jax.Array

class After(eqx.Module):
    scale: jax.Array
    mean: jax.Array

def load(saved, like):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, saved)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)

fields = load(Before(mean=jnp.zeros(2), scale=jnp.ones(2)), After(mean=jnp.zeros(2), scale=jnp.zeros(2)))
keys = load({"layer_9": jnp.full(2, 9.0), "layer_10": jnp.full(2, 10.0)},
            {"layer_09": jnp.zeros(2), "layer_10": jnp.zeros(2)})
seen = fields.mean[0], fields.scale[0], keys["layer_09"][0], keys["layer_10"][0]
print("equinox", eqx.__version__)
print("expected: mean 0, scale 1, layer_09 9, layer_10 10, or an error")
print("seen:     mean %g, scale %g, layer_09 %g, layer_10 %g" % seen)
raise SystemExit(seen != (1, 0, 10, 9))
EOF
