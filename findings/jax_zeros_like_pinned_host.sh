#!/usr/bin/env bash
# jnp.zeros_like(x) raises for an array in pinned_host memory on the CPU, and so does device_put to the device.
# "Memory kind mismatch with xla::PjRtBuffers" comes from the simplest ways to make a twin of x and to
# bring it back, while x + 1, jit(zeros_like) and device_put to jax.memory.Space.Device work.
# Versions: jax 0.10.2, CPU. No public report found.
# Instead: jnp.zeros(x.shape, x.dtype), and jax.device_put(x, jax.memory.Space.Device).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp, numpy as np

device = jax.devices()[0]
host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
x = jax.device_put(np.ones(3, np.float32), host)

def kind(make):
    try:
        return make(x).sharding.memory_kind
    except ValueError as error:
        return str(error).split(" with")[0]

seen = {
    "zeros_like": kind(jnp.zeros_like),
    "device_put(x, device)": kind(lambda x: jax.device_put(x, device)),
    "x + 1": kind(lambda x: x + 1),
    "device_put(x, Space.Device)": kind(lambda x: jax.device_put(x, jax.memory.Space.Device)),
}
print("jax", jax.__version__)
print("expected: an array each time")
print("seen:    ", seen)
mismatch = "Memory kind mismatch"
raise SystemExit(list(seen.values()) != [mismatch, mismatch, "pinned_host", "device"])
EOF
