"""Run every test as strictly as JAX allows, and keep compiled programs between runs.

With JAX_ENABLE_X64=1, numbers that tests write are float64 beside float32 parameters: dtypes then
promote as they do for users.
"""

import gc
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import pytest

# Nearly all the time of tests goes into programs that run once. The older emitters of XLA, which it
# has up to jax 0.10, compile them in half the time. With XLA_FLAGS set, even to "", XLA does only
# what that says; .github/workflows/ci.yml tests with all defaults.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# What one worker has compiled, the others take, and so do processes that tests begin.
cache = pathlib.Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

promotion = "standard" if jax.config.read("jax_enable_x64") else "strict"
jax.config.update("jax_numpy_dtype_promotion", promotion)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
# What JAX keeps of thousands of programs lives long: collecting more often only walks over it.
gc.set_threshold(100_000, 50, 100)

# These files take a worker longest; it begins with them, so that none is left alone with one.
LONG = (
    "laws",
    "law_edges",
    "guard",
    "keras_live",
    "bucket",
    "notebooks",
    "readme",
    "benchmarks",
    "laws_on_devices",
    "shard_state",
)
# Of these files every test is slow. Elsewhere a slow test has its own mark.
SLOW = ("benchmarks", "keras_live", "laws_on_devices", "notebooks", "readme", "shard_state")


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    for item in items:
        if item.path.stem in {f"test_{name}" for name in SLOW}:
            item.add_marker(pytest.mark.slow)
