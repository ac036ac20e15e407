#!/usr/bin/env bash
# jax.device_put(a, may_alias=False) of a numpy array on the CPU still shares the memory of the array.
# The documentation of may_alias says: "If False, `x` will be copied." The jax array, which should not
# change, follows later writes to the numpy array. (The array here is aligned to 64 bytes; others are copied.)
# Versions: jax 0.10.2. Source: https://github.com/jax-ml/jax/issues/37830
# Instead: jnp.array(a), which copies.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, numpy as np

raw = np.zeros(1016, np.float32)
start = -raw.ctypes.data % 64 // 4
a = raw[start : start + 1000]
put = jax.device_put(a, may_alias=False)
copied = jnp.array(a)
jax.block_until_ready((put, copied))
a[0] = 7
print("jax", jax.__version__)
print("documentation:", "If False, `x` will be copied" in jax.device_put.__doc__)
print("expected: 0.0 after the write to the numpy array")
print("seen:    ", put[0], "with jnp.array:", copied[0])
raise SystemExit(not (put[0] == 7 and copied[0] == 0))
EOF
