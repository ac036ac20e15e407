#!/usr/bin/env bash
# XLA on the CPU (jaxlib 0.10.2) compiles a sum of squares that is exactly 0 to NaN.
# u is 0 and the scale c is a finite 2**80, so u*c is 0 and its square is 0. The numbers fit a rewrite of
# (u*c)**2 to u**2 * c**2: c**2 is inf in float32 and 0 * inf is NaN. One does not expect a compiler
# to change a finite program to NaN when no fast-math flag is set. With u as an argument it is right.
# Versions: jax and jaxlib 0.10.2 (jax 0.12.0.1 gives 0). No public report found.
# Instead: scale by a factor whose square is finite, or give the value as an argument of the jitted function.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp

def norm(u):
    c = jnp.where(jnp.sum(u * u) < 2.0**-80, 2.0**80, 1.0)
    return jnp.sum((u * c) ** 2)

eager = norm(jnp.zeros(3))
constant = jax.jit(lambda: norm(jnp.zeros(3)))()
argument = jax.jit(norm)(jnp.zeros(3))
print("jax", jax.__version__)
print("expected: 0 0 0")
print("seen:    ", eager, constant, argument)
raise SystemExit(not (eager == 0 and jnp.isnan(constant) and argument == 0))
EOF
