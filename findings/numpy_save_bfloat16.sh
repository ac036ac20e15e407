#!/usr/bin/env bash
# np.save of a bfloat16 array works, and np.load of the file gives raw bytes of dtype V2.
# ml_dtypes' types have no code in numpy's file format, so the type's name is not in the file. Neither
# call warns, so one finds out when the file is needed. The same holds for np.savez.
# Versions: numpy 2.4.6, jax 0.10.2. Source: https://github.com/jax-ml/ml_dtypes/issues/41
# Instead: save x.view(np.uint16) and its dtype's name; or repair with loaded.view(ml_dtypes.bfloat16).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.7.0
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import io, warnings
import jax, jax.numpy as jnp, numpy as np

warnings.simplefilter("error")
file = io.BytesIO()
np.save(file, np.asarray(jnp.arange(3, dtype=jnp.bfloat16)))
file.seek(0)
seen = np.load(file)
repaired = seen.view(jnp.bfloat16)
print("numpy", np.__version__, "jax", jax.__version__)
print("expected: bfloat16 [0 1 2], or an error from np.save")
print("seen:    ", seen.dtype, seen, "| view:", repaired)
raise SystemExit(seen.dtype != np.dtype("V2") or repaired.tolist() != [0, 1, 2])
EOF
