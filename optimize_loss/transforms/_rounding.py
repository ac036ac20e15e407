"""Round parameters of few bits stochastically, and chains that keep their state in fewer bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optimize_loss._engine.arrays import is_narrow
from optimize_loss._engine.bits import round_to
from optimize_loss._engine.chain import Chain, chain
from optimize_loss._engine.link import Link, Numbers, Seed, Slots, Stage
from optimize_loss._engine.order import arranged
from optimize_loss._engine.precision import Precision, check_precision
from optimize_loss._engine.selection import ForParameters, linked
from optimize_loss._random import quick_bits


@dataclasses.dataclass(frozen=True)
class RoundParams(Link):
    """Round the updated parameter stochastically to one of its two neighbors.

        p + u between a and b:  b with probability (p + u - a) / (b - a), else a

    It rounds floats of 16 bits and fewer; other parameters pass unchanged. Rounding to nearest
    loses updates of less than half a unit in the last place, 0.2 % of a bfloat16; stochastic
    rounding is right on average. The random bits are a function of the seed, the parameter's name,
    the number of updates and the index of the entry. It comes after everything that changes the
    update; `update` returns the difference to the rounded sum. NaN and infinity do not change.

    Args:
      seed: an integer in [0, 2**32).

    Example:
      200 updates of 1/1000, each less than half of what a bfloat16 below 1 can change by:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> T = ol.transforms
      >>> tx = T.chain(rate=T.ScaleByLearningRate(1.0), rounding=T.RoundParams())
      >>> p, g = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 1e-3)
      >>> state = tx.init(p)
      >>> for _ in range(200):
      ...     p, state = tx.apply(g, state, p)
      >>> bool(abs(p.astype(jnp.float32).mean() - 0.8) < 0.005)
      True

    References:
      S. Gupta et al., "Deep Learning with Limited Numerical Precision", 2015,
      https://arxiv.org/abs/1502.02551, section 3.
    """

    seed: Seed = 0
    reads_params = True
    elementwise = True
    needs = "random_bits"
    stage = Stage.ROUND

    def after(
        self, param: jax.Array, moved: jax.Array, slots: Slots, k: Numbers
    ) -> tuple[jax.Array, Slots]:
        """Move to a neighbor; unchanged if the parameter is not finite."""
        if not can_be_rounded("", param):
            return moved, slots
        old, bits = param.astype(moved.dtype), quick_bits(k["draw"], moved.shape)
        new = round_to(old + moved, param.dtype, bits) - old
        return jnp.where(jnp.isfinite(old), new, moved), slots


def can_be_rounded(name: str, param: Any) -> bool:
    """Return whether a parameter has 16 bits or fewer, and more than an exponent."""
    return is_narrow(param.dtype) and jnp.finfo(param.dtype).nmant > 0


def with_precision(links: Chain, precision: Any, *, seed: int = 0) -> Chain:
    """Return a chain that keeps its moments, and 16-bit parameters, as `precision` says.

    With `Precision(params="stochastic")`, the default, it has one more link, `round_params`, before
    the links that average parameters.

    Args:
      links: a chain.
      precision: "bfloat16", "float8" or a `Precision`; None or "float32" changes nothing.
      seed: the seed of the random bits, unless the precision has its own.

    Raises:
      InvalidType: an argument is of the wrong kind.
      ValueError: `precision` is unknown; or the chain already has one.

    Example:
      >>> import jax, jax.numpy as jnp, optimize_loss as ol
      >>> T = ol.transforms
      >>> tx = T.chain(adam=T.ScaleByAdam(), rate=T.ScaleByLearningRate(0.1))
      >>> half = T.with_precision(tx, "bfloat16")
      >>> params = {"w": jnp.zeros((100, 100))}
      >>> def bytes_of(tx):
      ...     return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)["adam"]) if x.ndim)
      >>> bytes_of(tx), bytes_of(half)
      (80016, 40016)
    """
    chosen = check_precision(precision, seed)
    if chosen is None:
        return links
    if links.precision is not None:
        raise ValueError(f"`links` must have no precision yet. Received: {links.precision}.")
    entries = dict(links.links)
    has_one = any(isinstance(link, RoundParams) for _, link in linked(entries))
    if chosen.params == "stochastic" and not has_one:
        if "round_params" in entries:
            raise ValueError("The links must have other names than 'round_params'.")
        rounds = ForParameters(can_be_rounded, RoundParams(chosen.seed or 0), optional=True)
        entries = arranged(entries, {"round_params": rounds})
    return dataclasses.replace(chain(**entries), precision=chosen)


__all__ = ["Precision", "RoundParams", "with_precision"]
