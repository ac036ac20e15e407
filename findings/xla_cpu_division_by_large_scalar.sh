#!/usr/bin/env bash
# XLA on the CPU divides an array by one large number by way of the reciprocal, and loses the whole result.
# x / max(x) of [1.8e38, 2.4e38] is [0, 0]: 1 / 2.4e38 is subnormal in float32 and is flushed to 0.
# Both numbers and both quotients are ordinary float32 values, so a division by the maximum looks safe.
# Scaling both sides by 1/4 first gives [0, 0] as well. With the divisor as an array argument it is right.
# Versions: jax and jaxlib 0.10.2. Flushing of subnormals: https://github.com/openxla/xla/issues/22858
# Instead: x / jax.lax.optimization_barrier(jnp.full_like(x, jnp.max(x))).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, numpy as np

x = np.array([1.8e38, 2.4e38], np.float32)
expected = x / x.max()
seen = jax.jit(lambda x: x / jnp.max(x))(x)
argument = jax.jit(lambda x, y: x / y)(x, np.full_like(x, x.max()))
barrier = jax.jit(lambda x: x / jax.lax.optimization_barrier(jnp.full_like(x, jnp.max(x))))(x)
print("jax", jax.__version__)
print("expected:", expected)
print("seen:    ", seen)
print("divisor as argument:", argument, "with a barrier:", barrier)
good = np.allclose(argument, expected) and np.allclose(barrier, expected)
raise SystemExit(not (np.all(seen == 0) and good))
EOF
