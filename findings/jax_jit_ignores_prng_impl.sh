#!/usr/bin/env bash
# A jitted function keeps the random generator of its first call, whatever default_prng_impl says later.
# The cache of jit does not look at jax_default_prng_impl, although other settings that change the program
# are in its key (jax_threefry_partitionable: https://github.com/jax-ml/jax/pull/13361). A second jax.jit
# of the same function shares the cache.
# A PRNGKey made under "rbg" has 4 words without jit, but 2 (threefry) from a jit that already ran.
# Versions: jax 0.10.2. No public report found.
# Instead: name the generator in the call, jax.random.key(seed, impl="rbg"), or set it once at start.
set -euo pipefail
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$dir/venv/bin/python" -I - <<'EOF'
import jax

def shape(make):
    return make(0).shape

before = shape(jax.jit(jax.random.PRNGKey))
with jax.default_prng_impl("rbg"):
    eager = shape(jax.random.PRNGKey)
    again = shape(jax.jit(jax.random.PRNGKey))
    new = shape(jax.jit(lambda seed: jax.random.PRNGKey(seed)))
print("jax", jax.__version__)
print("expected under rbg: (4,) with and without jit")
print("seen under rbg: without jit", eager, "jit that ran before", again, "new function", new)
raise SystemExit((before, eager, again, new) != ((2,), (4,), (2,), (4,)))
EOF
