#!/usr/bin/env bash
# jax.grad of a function that works raises on an array of an Explicit mesh, unless jit is outside or set_mesh is on.
# f(p), jit(f)(p) and jit(grad(f))(p) work, since jax reads the mesh from p. grad(f)(p) and
# grad(jit(f))(p) raise "Length of device assignment 1 is not equal to the size of the mesh 2".
# One expects grad to work where the function works.
# Versions: jax 0.10.2, two CPU devices. No public report found.
# Instead: with jax.set_mesh(mesh), or call jax.jit(jax.grad(f)).
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
p = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("d")))

def f(p):
    return jnp.sum(p**2)

def outcome(g):
    try:
        g(p)
        return "works"
    except ValueError as error:
        return str(error)[:36]

seen = [outcome(g) for g in (f, jax.jit(jax.grad(f)), jax.grad(f), jax.grad(jax.jit(f)))]
with jax.set_mesh(mesh):
    seen.append(outcome(jax.grad(f)))
print("jax", jax.__version__)
print("expected: f, jit(grad(f)), grad(f), grad(jit(f)), grad(f) under set_mesh work")
print("seen:    ", seen)
error = "Length of device assignment 1 is not"
raise SystemExit(seen != ["works", "works", error, error, "works"])
EOF
