#!/usr/bin/env bash
# While the result of np.asarray(x) is alive, jax.jit(..., donate_argnums=0) silently does not donate x.
# On the CPU np.asarray(x) is a view of x's buffer. jax then keeps the buffer,
# without a warning: x stays usable and the memory is needed twice. A log line that keeps a numpy view
# of the parameters so undoes donation, and code that relies on x.is_deleted() gives another answer.
# Versions: jax 0.10.2. Source (donation): https://docs.jax.dev/en/latest/buffer_donation.html
# Instead: keep np.array(x, copy=True), or drop the view before the call.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, numpy as np

step = jax.jit(lambda x: x + 1, donate_argnums=0)

def donated(look):
    x = jax.block_until_ready(step(jnp.zeros(1000)))
    seen = look(x)
    y = step(x)
    return x.is_deleted()

answers = {
    "nothing kept": donated(lambda x: None),
    "view kept": donated(np.asarray),
    "copy kept": donated(lambda x: np.array(x, copy=True)),
}
print("jax", jax.__version__)
print("expected: x is deleted each time")
print("seen:    ", answers)
raise SystemExit(list(answers.values()) != [True, False, True])
EOF
