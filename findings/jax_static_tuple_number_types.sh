#!/usr/bin/env bash
# jax.jit takes static arguments (2,) and (2.0,) for the same, and returns the result of the first call's type.
# For a bare number jit does compare types: n=2 and n=2.0 compile twice. Inside a tuple only == and
# hash count, so the program of the integer is used for the float.
# The same holds for 0.0 and -0.0, even bare. The result depends on which call came first.
# Versions: jax 0.10.2. Source (older, bare numbers): https://github.com/jax-ml/jax/issues/9273
# Instead: turn numbers into one type before the call, or pass them as arrays and not as static.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp

bare = jax.jit(lambda x, n: x * n, static_argnames="n")
nested = jax.jit(lambda x, n: x * n[0], static_argnames="n")
inverse = jax.jit(lambda x, n: x / n, static_argnames="n")
x = jnp.arange(3)
types = [
    (bare(x, n=2).dtype.name, bare(x, n=2.0).dtype.name),
    (nested(x, n=(2,)).dtype.name, nested(x, n=(2.0,)).dtype.name),
]
zeros = float(inverse(1.0, n=0.0)), float(inverse(1.0, n=-0.0))
print("jax", jax.__version__)
print("expected: int32 then float32 for both; inf then -inf")
print("seen:     bare", types[0], "tuple", types[1], "1 / 0.0, 1 / -0.0:", zeros)
inf = float("inf")
raise SystemExit(types != [("int32", "float32"), ("int32", "int32")] or zeros != (inf, inf))
EOF
