#!/usr/bin/env bash
# jnp.asarray of a numpy int64 array silently drops the upper 32 bits; the same number in a list raises.
# With jax_enable_x64 off, int64 becomes int32. jnp.asarray([2**40 + 5]) raises OverflowError, but
# jnp.asarray(np.array([2**40 + 5])) is [5], without a warning. Step counts, hashes, and time stamps
# in numpy arrays so turn into other valid numbers. The smaller dtype is documented.
# Versions: jax 0.10.2, numpy 2.4.6. Source: https://docs.jax.dev/en/latest/default_dtypes.html
# Instead: compare with np.iinfo(np.int32) first, or set jax_enable_x64.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import warnings
import jax, jax.numpy as jnp, numpy as np

warnings.simplefilter("error")
number = 2**40 + 5
try:
    as_list = jnp.asarray([number]).tolist()
except OverflowError:
    as_list = "OverflowError"
seen = jnp.asarray(np.array([number])).tolist()
argument = jax.jit(lambda x: x)(np.array([number])).tolist()
print("jax", jax.__version__)
print("expected: OverflowError for list, numpy array, and argument of jit")
print("seen:    ", as_list, seen, argument)
raise SystemExit((as_list, seen, argument) != ("OverflowError", [5], [5]))
EOF
