#!/usr/bin/env bash
# init(shapes) on jax.ShapeDtypeStruct works for optax.adam, but raises TypeError when wrapped in inject_hyperparams.
# Most optax transformations only read shape and dtype of the params in init, so a dry run on shapes
# seems supported. inject_hyperparams and contrib.dog do arithmetic on the params and fail with
# "float() argument must be a string or a real number, not 'ShapeDtypeStruct'".
# Versions: optax 0.2.8, jax 0.10.2. No public report found; optax does not promise init on shapes.
# Instead: jax.eval_shape(tx.init, shapes), which works for all of them.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, optax

shapes = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}

def outcome(run):
    try:
        run()
        return "works"
    except TypeError as error:
        return "TypeError"

txs = optax.adam(1e-3), optax.inject_hyperparams(optax.adam)(1e-3), optax.contrib.dog(1.0)
direct = [outcome(lambda: tx.init(shapes)) for tx in txs]
abstract = [outcome(lambda: jax.eval_shape(tx.init, shapes)) for tx in txs]
print("optax", optax.__version__)
print("expected: works for adam, inject_hyperparams(adam), dog")
print("seen:     init", direct, "eval_shape", abstract)
raise SystemExit(direct != ["works", "TypeError", "TypeError"] or abstract != ["works"] * 3)
EOF
