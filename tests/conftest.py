"""Run every test as strictly as JAX allows, and keep compiled programs between runs.

With JAX_ENABLE_X64=1, numbers that tests write are float64 beside float32 parameters: dtypes then
promote as they do for users.
"""

import gc
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax

promotion = "standard" if jax.config.read("jax_enable_x64") else "strict"
jax.config.update("jax_numpy_dtype_promotion", promotion)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
# What JAX keeps of thousands of programs lives long: collecting more often only walks over it.
gc.set_threshold(100_000, 50, 100)
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = pathlib.Path(__file__).parent.parent / ".jax_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# These files take a worker longest; it begins with them, so that none is left alone with one.
LONG = ("laws", "shard_state", "benchmarks", "keras_live", "bucket", "guard", "notebooks", "readme")


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
