"""TensorFlow 1's functions of (learning_rate, global_step, …): the arithmetic of schedules."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss import _checks
from optimize_loss.schedules._arguments import (
    as_rate,
    as_scalar,
    check_all,
    check_increasing,
    check_one_more,
)


def exponential_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: float,
    decay_rate: float,
    staircase: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Multiply the rate by `decay_rate` once every `decay_steps` steps.

    ηₙ = η · r^(n/D), with n/D rounded down if `staircase`.

    Args:
      learning_rate: η, the rate at step 0; at least 0.
      global_step: n, steps, from 0.
      decay_steps: D, steps; a whole number of at least 1.
      decay_rate: r, a factor; at least 0.
      staircase: keep the rate for `decay_steps` steps, then change it at once.
      name: unused; TF1 named the operations of its graph by it.

    Raises:
      InvalidType: an argument is not a number, not a scalar, or traced where it must not be.
      ValueError: an argument is outside its range.

    Example:
      >>> exponential_decay(8.0, global_step=2, decay_steps=1, decay_rate=0.5)
      Array(2., dtype=float32)

    References:
      Matches tf.train.exponential_decay. A staircase is exact at every multiple of `decay_steps`,
      also where a compiler multiplies by 1/D, and negative arguments raise.
    """
    rate, decay_rate, p = _progress(learning_rate, global_step, decay_steps, decay_rate, staircase)
    return rate * decay_rate**p


def natural_exp_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: float,
    decay_rate: float,
    staircase: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Shrink the rate by the natural exponential of the step.

    ηₙ = η · exp(-r · n/D), with n/D rounded down if `staircase`.

    Args:
      learning_rate: η, the rate at step 0; at least 0.
      global_step: n, steps, from 0.
      decay_steps: D, steps; a whole number of at least 1.
      decay_rate: r, per `decay_steps` steps; at least 0.
      staircase: keep the rate for `decay_steps` steps, then change it at once.
      name: unused; TF1 named the operations of its graph by it.

    Raises:
      InvalidType: an argument is not a number, not a scalar, or traced where it must not be.
      ValueError: an argument is outside its range.

    Example:
      exp(-ln 2) is one half.

      >>> rate = natural_exp_decay(8.0, global_step=2, decay_steps=1, decay_rate=math.log(2))
      >>> print(f"{rate:.3f}")
      2.000

    References:
      Matches tf.train.natural_exp_decay; the differences are those of `exponential_decay`.
    """
    rate, decay_rate, p = _progress(learning_rate, global_step, decay_steps, decay_rate, staircase)
    return rate * jnp.exp(-decay_rate * p)


def inverse_time_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: float,
    decay_rate: float,
    staircase: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Divide the rate by a number that grows linearly with the step.

    ηₙ = η / (1 + r · n/D), with n/D rounded down if `staircase`.

    Args:
      learning_rate: η, the rate at step 0; at least 0.
      global_step: n, steps, from 0.
      decay_steps: D, steps; a whole number of at least 1.
      decay_rate: r, per `decay_steps` steps; at least 0.
      staircase: keep the rate for `decay_steps` steps, then change it at once.
      name: unused; TF1 named the operations of its graph by it.

    Raises:
      InvalidType: an argument is not a number, not a scalar, or traced where it must not be.
      ValueError: an argument is outside its range.

    Example:
      >>> inverse_time_decay(8.0, global_step=3, decay_steps=1, decay_rate=1.0)
      Array(2., dtype=float32)

    References:
      Matches tf.train.inverse_time_decay; the differences are those of `exponential_decay`.
    """
    rate, decay_rate, p = _progress(learning_rate, global_step, decay_steps, decay_rate, staircase)
    return rate / (1 + decay_rate * p)


def piecewise_constant(
    x: Any, boundaries: Sequence[float], values: Sequence[Any], name: str | None = None
) -> jax.Array:
    """Return the value of the interval that the step lies in.

    v₀ where x ≤ b₀, vᵢ where bᵢ₋₁ < x ≤ bᵢ, the last value above the last boundary.

    Args:
      x: the step; integers are compared as integers.
      boundaries: steps, strictly increasing. A boundary itself still has the earlier value.
      values: one more than `boundaries`; numbers or traced scalars.
      name: unused; TF1 named the operations of its graph by it.

    Raises:
      InvalidType: an argument is not a number or not a sequence of numbers.
      ValueError: `boundaries` do not increase, or `values` are not one more.

    Example:
      >>> [float(piecewise_constant(n, [5, 10], [4.0, 2.0, 1.0])) for n in (0, 5, 6, 11)]
      [4.0, 4.0, 2.0, 1.0]

    References:
      Matches tf.train.piecewise_constant; boundaries that do not increase raise.
    """
    boundaries = check_increasing(boundaries)
    values = check_one_more("values", values, boundaries)
    x = jnp.asarray(as_scalar("x", x))
    if jnp.issubdtype(x.dtype, jnp.integer):  # as floats, steps above 2²⁴ would fall together
        low, high = jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max
        edges = np.array([min(max(math.floor(b), low), high) for b in boundaries], x.dtype)
    else:
        x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        edges = np.array(boundaries, x.dtype)
    rates = [as_rate(f"values[{i}]", value, _checks.FINITE) for i, value in enumerate(values)]
    dtype = jnp.float64 if any(rate.dtype == jnp.float64 for rate in rates) else jnp.float32
    return jnp.stack([rate.astype(dtype) for rate in rates])[jnp.sum(x > edges)]


def polynomial_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: float,
    end_learning_rate: Any = 0.0001,
    power: float = 1.0,
    cycle: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Lower the rate to `end_learning_rate` along a power of the steps that remain.

    ηₙ = (η - ηₑ) · (1 - min(n, D)/D)^p + ηₑ; with `cycle`, D grows to the next multiple of itself
    each time it is passed.

    Args:
      learning_rate: η, the rate at step 0; at least 0.
      global_step: n, steps, from 0.
      decay_steps: D, steps; a whole number of at least 1.
      end_learning_rate: ηₑ, the rate from step D on; at least 0; a number or a traced scalar.
      power: p; at least 0; 1 is a straight line.
      cycle: start again, lower, after each multiple of D.
      name: unused; TF1 named the operations of its graph by it.

    Raises:
      InvalidType: an argument is not a number, not a scalar, or traced where it must not be.
      ValueError: an argument is outside its range.

    Example:
      >>> polynomial_decay(4.0, global_step=5, decay_steps=10, end_learning_rate=2.0)
      Array(3., dtype=float32)

    References:
      Matches tf.train.polynomial_decay; at the end of a cycle the rate is exactly ηₑ.
    """
    decay_steps, power, cycle = check_all(decay_steps=decay_steps, power=power, cycle=cycle)
    rate = as_rate("learning_rate", learning_rate)
    end = as_rate("end_learning_rate", end_learning_rate).astype(rate.dtype)
    step = as_scalar("global_step", global_step, rate.dtype)
    length = decay_steps
    if cycle:
        length = decay_steps * jnp.maximum(-jnp.floor_divide(-step, decay_steps), 1.0)
    # n·(1/D), which compilers put for n/D, need not reach 1; a small power would magnify the rest.
    p = jnp.where(step < length, step / length, 1.0)
    return (rate - end) * jnp.power(1 - p, power) + end


def cosine_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: float,
    alpha: float = 0.0,
    name: str | None = None,
) -> jax.Array:
    """Lower the rate to `alpha` times itself along half a cosine wave.

    ηₙ = η · ((1 - α) · ½(1 + cos(π · min(n, D)/D)) + α)

    Args:
      learning_rate: η, the rate at step 0; at least 0.
      global_step: n, steps, from 0.
      decay_steps: D, steps; a whole number of at least 1.
      alpha: α, the final rate as a fraction of the first; at least 0; above 1 the rate rises.
      name: unused; TF1 named the operations of its graph by it.

    Raises:
      InvalidType: an argument is not a number, not a scalar, or traced where it must not be.
      ValueError: an argument is outside its range.

    Example:
      >>> [float(cosine_decay(4.0, n, decay_steps=10, alpha=0.5)) for n in (0, 5, 10, 99)]
      [4.0, 3.0, 2.0, 2.0]

    References:
      Matches tf.train.cosine_decay. I. Loshchilov and F. Hutter, "SGDR: Stochastic gradient descent
      with warm restarts", 2017, https://arxiv.org/abs/1608.03983, equation 5 without restarts.
    """
    decay_steps, alpha = check_all(decay_steps=decay_steps, alpha=alpha)
    rate = as_rate("learning_rate", learning_rate)
    return along_cosine(rate, as_scalar("global_step", global_step, rate.dtype), decay_steps, alpha)


def cosine_decay_restarts(
    learning_rate: Any,
    global_step: Any,
    first_decay_steps: float,
    t_mul: float = 2.0,
    m_mul: float = 1.0,
    alpha: float = 0.0,
    name: str | None = None,
) -> jax.Array:
    """Run cosine decays one after the other, each `t_mul` times longer and `m_mul` times as high.

    ηₙ = η · ((1 - α) · mⁱ · ½(1 + cos(π · f)) + α), where f in [0, 1) is the part of decay i, of
    length D·tⁱ, that step n has reached.

    Args:
      learning_rate: η, the rate at step 0; at least 0.
      global_step: n, steps, from 0.
      first_decay_steps: D, the length of decay 0 in steps; a whole number of at least 1.
      t_mul: t, the factor from one length to the next; at least 1.
      m_mul: m, the factor from one height to the next; at least 0.
      alpha: α, the lowest rate as a fraction of the first; at least 0.
      name: unused; TF1 named the operations of its graph by it.

    Raises:
      InvalidType: an argument is not a number, not a scalar, or traced where it must not be.
      ValueError: an argument is outside its range.

    Example:
      Decays begin at steps 0, 4 and 12.

      >>> [float(cosine_decay_restarts(4.0, n, 4, m_mul=0.5)) for n in (0, 4, 12)]
      [4.0, 2.0, 1.0]

    References:
      Matches tf.train.cosine_decay_restarts, but for t_mul below 1, which raises: there TF gives
      NaN from step D/(1 - t) on. I. Loshchilov and F. Hutter, "SGDR: Stochastic gradient descent
      with warm restarts", 2017, https://arxiv.org/abs/1608.03983, equation 5.
    """
    first, t_mul, m_mul, alpha = check_all(
        first_decay_steps=first_decay_steps, t_mul=t_mul, m_mul=m_mul, alpha=alpha
    )
    rate = as_rate("learning_rate", learning_rate)
    restarts, part = _restart(as_scalar("global_step", global_step, rate.dtype), first, t_mul)
    height = jnp.power(m_mul, restarts)
    return rate * ((1 - alpha) * height * _half_cosine(part) + alpha)


def linear_cosine_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: float,
    num_periods: float = 0.5,
    alpha: float = 0.0,
    beta: float = 0.001,
    name: str | None = None,
) -> jax.Array:
    """Lower the rate along a straight line times a cosine wave.

    ηₙ = η · ((α + (D - n)/D) · ½(1 + cos(2π · k · n/D)) + β), with n at most D.

    Args:
      learning_rate: η; at least 0. The rate at step 0 is η · (1 + α + β).
      global_step: n, steps, from 0.
      decay_steps: D, steps; a whole number of at least 1.
      num_periods: k, waves within `decay_steps`; at least 0.
      alpha: α, a fraction of η; at least 0.
      beta: β, a fraction of η; at least 0.
      name: unused; TF1 named the operations of its graph by it.

    Raises:
      InvalidType: an argument is not a number, not a scalar, or traced where it must not be.
      ValueError: an argument is outside its range.

    Example:
      >>> [float(linear_cosine_decay(4.0, n, decay_steps=10, beta=0.5)) for n in (0, 5, 10)]
      [6.0, 3.0, 2.0]

    References:
      Matches tf.train.linear_cosine_decay. I. Bello, B. Zoph, V. Vasudevan and Q. V. Le, "Neural
      optimizer search with reinforcement learning", 2017, https://arxiv.org/abs/1709.07417.
    """
    decay_steps, num_periods, alpha, beta = check_all(
        decay_steps=decay_steps, num_periods=num_periods, alpha=alpha, beta=beta
    )
    rate = as_rate("learning_rate", learning_rate)
    step = jnp.minimum(as_scalar("global_step", global_step, rate.dtype), decay_steps)
    line = (decay_steps - step) / decay_steps
    wave = _half_cosine(2.0 * num_periods * (step / decay_steps))
    return rate * ((alpha + line) * wave + beta)


def _progress(
    learning_rate: Any, global_step: Any, decay_steps: Any, decay_rate: Any, staircase: Any
) -> tuple[jax.Array, float, jax.Array]:
    """Return the rate, the decay rate, and the steps in units of `decay_steps`."""
    decay_steps, decay_rate, staircase = check_all(
        decay_steps=decay_steps, decay_rate=decay_rate, staircase=staircase
    )
    rate = as_rate("learning_rate", learning_rate)
    step = as_scalar("global_step", global_step, rate.dtype)
    # Compilers put n·(1/D) for n/D: rounded down, that is one too few at some multiples of D.
    p = jnp.floor_divide(step, decay_steps) if staircase else step / decay_steps
    return rate, decay_rate, p


def _restart(step: jax.Array, first: float, t_mul: float) -> tuple[jax.Array, jax.Array]:
    """Return how many decays of lengths first·t_mulⁱ are over, and the part done of the next."""
    if t_mul == 1:
        return jnp.floor_divide(step, first), jnp.remainder(step, first) / first
    growth, log = t_mul - 1, math.log(t_mul)

    def starts(i: Any) -> Any:
        return jnp.expm1(i * log) / growth

    lengths = step / first
    # The logarithm may be one off next to a restart, and so are the starts by their last bits.
    now = lengths * (1 + 1e-6)
    i = jnp.floor(jnp.log1p(lengths * growth) / log)
    i = jnp.where(starts(i + 1) <= now, i + 1, i)
    i = jnp.where(starts(i) > now, i - 1, i)
    return i, (lengths - starts(i)) / t_mul**i


def along_cosine(rate: Any, step: jax.Array, steps: float, alpha: float) -> jax.Array:
    """Return `cosine_decay`, also where its length is a fraction of a step."""
    part = jnp.minimum(step, steps) / steps
    return rate * ((1 - alpha) * _half_cosine(part) + alpha)


def _half_cosine(part: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.cos(math.pi * part))
