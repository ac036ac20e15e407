"""Steps with buckets, and how to compare them with those without."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optimize_loss as ol
from optimize_loss._engine.bucket import Bucket
from optimize_loss._names import leaf_names

T = ol.transforms
LARGE = 1 << 20
NEED_MORE = {"LossScaleOptimizer", "MultiOptimizer", "MomentumOptimizer"}  # than a rate
OPTIMIZERS = sorted({*ol.optimizers.names(), *ol.OPTIMIZER_CLS_NAMES} - NEED_MORE)


def linear(params, grads):
    """A loss whose gradients are given."""
    pairs = zip(*map(jax.tree.leaves, (params, grads)), strict=True)
    parts = [jnp.sum((p.conj() * g.astype(p.dtype)).real.astype(jnp.float32)) for p, g in pairs]
    return functools.reduce(jnp.add, parts)


def steps_of(chain, loss: Any = linear, **options):
    """Return the same step without buckets and with them."""

    def made(bucket):
        step = ol.optimize_loss(loss, learning_rate=0.1, bucket=bucket, **options)
        return step if chain is None else dataclasses.replace(step, chain=chain)

    return made(None), made(LARGE)


def assert_alike(got, want, ulps):
    """Compare leaf by leaf, in units of the last place of the largest entry of the leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, a, b in zip(leaf_names(want), *map(jax.tree.leaves, (got, want)), strict=True):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if ulps == 0 or a.dtype.kind in "iub":
            np.testing.assert_array_equal(a, b, err_msg=name)
        elif a.size:
            unit = float(jnp.finfo(a.dtype).eps) * np.abs(np.asarray(b, complex)).max()
            assert np.abs(np.asarray(a, complex) - np.asarray(b, complex)).max() <= ulps * unit, (
                name
            )


def buckets_in(state):
    return [x for x in state.packed_params.values() if isinstance(x, Bucket)]


def adam(**more):
    return T.chain(
        multiply=T.MultiplyGradients({"**/bias": 0.5, "scale": 2.0, "encoder/1/kernel": 3.0}),
        adam=T.ScaleByAdam(),
        decay=T.AddWeightDecay(0.1, exclude=("**/bias",)),
        rate=T.ScaleByLearningRate(0.1),
        **more,
    )
