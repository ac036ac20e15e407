"""Keras' optimizers, with its names, defaults and numbers."""

import dataclasses
from typing import Annotated

from optimize_loss import transforms
from optimize_loss._checks import INNER_DECAY, STEP
from optimize_loss.optimizers._declaration import PositiveRate, Rate
from optimize_loss.optimizers._optimizer import Optimizer
from optimize_loss.transforms import (
    Count,
    Decay,
    Fraction,
    NotNegative,
    NotPositive,
    Positive,
    ScaleByLearningRate,
    Start,
)


class SGD(Optimizer):
    """Move against the gradient, optionally with momentum.

        a ← momentum · a - learning_rate · g
        p ← p + a      (or p + momentum · a - learning_rate · g with `nesterov`)

    Without momentum this is p ← p - learning_rate · g. The velocity a starts at 0 and is made of
    steps, not of gradients: when the rate changes, those already in it keep theirs. Clipping and
    then weight decay, p ← p - learning_rate · weight_decay · p, come before the rule; the average
    of the parameters comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.01.
      momentum: the share of the velocity that is kept at each step, in [0, 1].
      nesterov: whether to look ahead by one step.

    Example:
      Steps of 2, then 1 + 2, then 1.5 + 2:

      >>> import optimize_loss as ol
      >>> v, opt = ol.Variable(10.0), ol.optimizers.SGD(learning_rate=1.0, momentum=0.5)
      >>> for _ in range(3):
      ...     opt.minimize(lambda: 2 * v, [v])
      ...     print(v)
      8.0
      5.0
      1.5

    References:
      I. Sutskever et al., "On the importance of initialization and momentum in deep learning",
      2013, http://proceedings.mlr.press/v28/sutskever13.html, equations 1 and 2; with `nesterov` 3
      and 4, for the point at which the gradient is taken. Matches Keras 2.15 and Keras 3 `SGD`;
      Keras 3 has no velocity while `momentum` is 0; here and in 2.15 there is always one.
      `tf.train.MomentumOptimizer` (here `MomentumOptimizer`) and `optax.sgd` keep the rate outside
      the velocity: they differ when the rate changes.
    """

    learning_rate: Rate = 0.01
    momentum: Fraction = 0.0
    nesterov: bool = False

    def links(self):
        """Return the rate, then the momentum."""
        momentum = transforms.ScaleByMomentum(self.momentum, self.nesterov)
        return {"rate": ScaleByLearningRate(self.rate), "momentum": momentum}


class RMSprop(Optimizer):
    """Divide each gradient by the root of a running mean of its squares.

        q ← ρ q + (1-ρ) g²,   c = 0
        centered:  b ← ρ b + (1-ρ) g,   c = b²
        a ← momentum · a + learning_rate · g / √(q - c + ε)
        p ← p - a

    q, b and a start at 0, which is not corrected: uncentered, the first step is 1 / √(1-ρ) times
    the rate. ε is under the root, and the rate is inside the momentum. A variance q - c that
    rounding makes negative counts as 0. Clipping and then weight decay, p ← p - learning_rate ·
    weight_decay · p, come before the rule; the average of the parameters comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`. One default is
    RMSprop's own: with `use_ema`, the parameters become their average every 100 updates, unless
    `ema_overwrite_frequency` says otherwise.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.001.
      rho: ρ, in [0, 1).
      momentum: the share of a that is kept at each step, in [0, 1].
      epsilon: ε, above 0, in the unit of the gradients squared.
      centered: whether to divide by the standard deviation instead of the root mean square.

    Example:
      The mean of squares is 64 / 4 and its root 4, so the step is 0.5 · 8 / 4:

      >>> import optimize_loss as ol
      >>> v, opt = ol.Variable(10.0), ol.optimizers.RMSprop(learning_rate=0.5, rho=0.75)
      >>> opt.minimize(lambda: 8 * v, [v])
      >>> print(v.round(5))
      9.0

    References:
      T. Tieleman, G. Hinton, "Lecture 6.5, rmsprop", 2012,
      https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; A. Graves,
      "Generating Sequences With Recurrent Neural Networks", 2013, https://arxiv.org/abs/1308.0850,
      equations 38 to 41, for `centered` and `momentum`. Matches Keras 2.15 and Keras 3 `RMSprop`;
      in Keras 3 `ema_overwrite_frequency` is None. `tf.train.RMSPropOptimizer` (here
      `RMSPropOptimizer`) lets q start at 1 and has ε = 1e-10. `optax.rmsprop` has ε = 1e-8 and is
      else the same.
    """

    learning_rate: Rate = 0.001
    rho: Decay = 0.9
    momentum: Fraction = 0.0
    epsilon: Positive = 1e-7
    centered: bool = False
    ema_overwrite_frequency: Count | None = dataclasses.field(default=100, kw_only=True)

    def links(self):
        """Return the rule, the rate, and the momentum."""
        return {
            "rms": transforms.ScaleByRMS(self.rho, self.epsilon, self.centered),
            "rate": ScaleByLearningRate(self.rate),
            "momentum": transforms.ScaleByMomentum(self.momentum),
        }


class Adam(Optimizer):
    """Divide a running mean of the gradients by the root of a running mean of their squares.

        m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),   t = 1, 2, …
        p ← p - learning_rate · √(1-β₂ᵗ) / (1-β₁ᵗ) · m / (√v + ε)

    m and v start at 0; the two corrections undo that, so the first step has about the size of the
    rate, whatever the scale of the gradients. With `amsgrad` the largest v so far takes the place
    of v. t counts the optimizer's updates: a variable whose first gradient comes late
    starts with the correction of that time. Clipping and then weight decay,
    p ← p - learning_rate · weight_decay · p, come before the rule, which does not see the decay;
    the average of the parameters comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.001.
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.
      amsgrad: whether the denominator may never shrink.

    Example:
      The first steps of a constant gradient have the size of the rate:

      >>> import optimize_loss as ol
      >>> v, opt = ol.Variable(10.0), ol.optimizers.Adam(learning_rate=0.5)
      >>> for _ in range(2):
      ...     opt.minimize(lambda: 8 * v, [v])
      ...     print(v.round(4))
      9.5
      9.0

    References:
      D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015,
      https://arxiv.org/abs/1412.6980, section 2, last paragraph; S. Reddi, S. Kale, S. Kumar, "On
      the Convergence of Adam and Beyond", 2018, https://arxiv.org/abs/1904.09237, algorithm 2.
      Matches Keras 2.15 and Keras 3 `Adam`; `tf.train.AdamOptimizer` (here `AdamOptimizer`) has
      ε = 1e-8. The paper's algorithm 1 and `optax.adam` add ε to the root of the corrected v; here
      ε counts 1/√(1-β₂ᵗ) times what it counts there, at first 32 times with the default β₂.
      `optax.amsgrad` takes the largest of the corrected v, a different number.
    """

    learning_rate: Rate = 0.001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7
    amsgrad: bool = False

    def links(self):
        """Return the rule, then the rate."""
        adam = transforms.ScaleByAdam(self.beta_1, self.beta_2, self.epsilon, self.amsgrad)
        return {"adam": adam, "rate": ScaleByLearningRate(self.rate)}


class AdamW(Adam):
    """Run Adam, with parameters that shrink at every step.

        p ← p - learning_rate · weight_decay · p
        m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),   t = 1, 2, …
        p ← p - learning_rate · √(1-β₂ᵗ) / (1-β₁ᵗ) · m / (√v + ε)

    This is `Adam` with another default for `weight_decay`. The decay is no part of g, so that the
    denominator does not weaken it. Clipping comes before the decay, the average of the parameters
    after the rule. To decay some parameters only, name the others before the first update:
    `opt.exclude_from_weight_decay(var_names=["bias"])`.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.001.
      weight_decay: at least 0, per unit of the learning rate; 0.004. None for none.
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.
      amsgrad: whether the denominator may never shrink.

    Example:
      The decay takes 0.5 · 0.5 · 4 = 1 from 4, Adam's first step 0.5:

      >>> import optimize_loss as ol
      >>> v, opt = ol.Variable(4.0), ol.optimizers.AdamW(learning_rate=0.5, weight_decay=0.5)
      >>> opt.minimize(lambda: 8 * v, [v])
      >>> print(v.round(4))
      2.5

    References:
      I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019,
      https://arxiv.org/abs/1711.05101, algorithm 2, line 12, where the decay is not multiplied by
      the rate but by its schedule; `Adam` has the papers of the rest. Matches Keras 2.15 and
      Keras 3 `AdamW`. `optax.adamw` has a `weight_decay` of 1e-4, and ε as in `optax.adam`.
    """

    learning_rate: Rate = 0.001
    weight_decay: NotNegative | None = 0.004


class Adadelta(Optimizer):
    """Divide by the running size of the gradients, multiply by that of past updates.

        a ← ρ a + (1-ρ) g²,   u = √(d + ε) / √(a + ε) · g,   d ← ρ d + (1-ρ) u²
        p ← p - learning_rate · u

    a and d start at 0, so the first updates have about the size √ε: a larger ε starts faster. d is
    of updates before the rate. Clipping and then weight decay,
    p ← p - learning_rate · weight_decay · p, come before the rule; the average of the parameters
    comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.001. The paper has none: 1 is its rule.
      rho: ρ, in [0, 1).
      epsilon: ε, above 0: its root is in the unit of the parameters, and it is added to the
        gradients squared too.

    Example:
      The root of the mean of squares is 4, that of ε is 0.001, so the step is 0.001 / 4 · 8:

      >>> import optimize_loss as ol
      >>> opt = ol.optimizers.Adadelta(learning_rate=1.0, rho=0.75, epsilon=1e-6)
      >>> v = ol.Variable(4.0)
      >>> opt.minimize(lambda: 8 * v, [v])
      >>> print(v.round(5))
      3.998

    References:
      M. Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012,
      https://arxiv.org/abs/1212.5701, algorithm 1. Matches Keras 2.15 and Keras 3 `Adadelta`;
      `tf.train.AdadeltaOptimizer` (here `AdadeltaOptimizer`) has ε = 1e-8. `optax.adadelta` has
      ρ = 0.9 and ε = 1e-6, and is otherwise the same.
    """

    learning_rate: Rate = 0.001
    rho: Decay = 0.95
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        adadelta = transforms.ScaleByAdadelta(self.rho, self.epsilon)
        return {"adadelta": adadelta, "rate": ScaleByLearningRate(self.rate)}


class Adagrad(Optimizer):
    """Divide each gradient by the root of the sum of all its squares.

        n ← n + g²,   p ← p - learning_rate · g / √(n + ε)

    ε stands under the root. As n only grows, steps become ever smaller. Clipping and then weight
    decay, p ← p - learning_rate · weight_decay · p, come before the rule; the average of the
    parameters comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.001.
      initial_accumulator_value: n before the first step, at least 0.
      epsilon: ε, above 0, in the unit of the gradients squared.

    Example:
      The sum of squares is 9 + 16, and its root 5:

      >>> import optimize_loss as ol
      >>> opt = ol.optimizers.Adagrad(learning_rate=1.0, initial_accumulator_value=9.0)
      >>> v = ol.Variable(4.0)
      >>> opt.minimize(lambda: 4 * v, [v])
      >>> print(f"{v:.3f}")
      3.200

    References:
      J. Duchi, E. Hazan, Y. Singer, "Adaptive Subgradient Methods for Online Learning and
      Stochastic Optimization", 2011, https://jmlr.org/papers/v12/duchi11a.html, figure 1, with a
      diagonal matrix. Matches Keras 2.15 and Keras 3 `Adagrad`, and `optax.adagrad`;
      `tf.train.AdagradOptimizer` (here `AdagradOptimizer`) has no ε.
    """

    learning_rate: Rate = 0.001
    initial_accumulator_value: Start = 0.1
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        adagrad = transforms.ScaleByAdagrad(self.initial_accumulator_value, self.epsilon)
        return {"adagrad": adagrad, "rate": ScaleByLearningRate(self.rate)}


class Adamax(Optimizer):
    """Divide a running mean of the gradients by their largest size, which fades.

        m ← m + (1-β₁)(g - m),   u ← max(β₂ u, |g|),   t = 1, 2, …
        p ← p - learning_rate / (1-β₁ᵗ) · m / (u + ε)

    m and u start at 0; a maximum needs no correction. Gradients are not squared, so that small ones
    do not underflow. Clipping and then weight decay, p ← p - learning_rate · weight_decay · p, come
    before the rule; the average of the parameters comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.001.
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1); the share of the largest size that is left a step later.
      epsilon: ε, above 0, in the unit of the gradients.

    Example:
      The gradient falls from 4 to 1; the size by which it is divided only from 4 to 2:

      >>> import optimize_loss as ol
      >>> v, opt = ol.Variable(4.0), ol.optimizers.Adamax(1.0, beta_1=0.0, beta_2=0.5)
      >>> for grad in (4.0, 1.0):
      ...     _ = opt.apply_gradients([(grad, v)])
      ...     print(v.round(5))
      3.0
      2.5

    References:
      D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015,
      https://arxiv.org/abs/1412.6980, algorithm 2, which has no ε. Matches Keras 2.15 and Keras 3
      `Adamax`. `optax.adamax` adds its ε, 1e-8, to |g| before the maximum, where it fades: with an
      ε that counts beside the gradients the two differ.
    """

    learning_rate: Rate = 0.001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        adamax = transforms.ScaleByAdamax(self.beta_1, self.beta_2, self.epsilon)
        return {"adamax": adamax, "rate": ScaleByLearningRate(self.rate)}


class Nadam(Optimizer):
    """Run Adam, one step ahead, by a momentum μ that grows from about β₁ / 2 to β₁.

        m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),   t = 1, 2, …
        μₜ = β₁ (1 - 0.96ᵗ / 2),   P ← P · μₜ
        m̂ = μₜ₊₁ · m / (1 - P μₜ₊₁) + (1-μₜ) · g / (1 - P)
        p ← p - learning_rate · m̂ / (√(v / (1-β₂ᵗ)) + ε)

    m and v start at 0, P at 1; P is multiplied once a step, however many variables there are, and
    is saved with the rest. ε is added to the root of the corrected v, not as in `Adam`. Clipping
    and then weight decay, p ← p - learning_rate · weight_decay · p, come before the rule; the
    average of the parameters comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.001.
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.

    Example:
      The first momentum, and so the product, is 0.5 · (1 - 0.96 / 2) = 0.26:

      >>> import optimize_loss as ol
      >>> v, opt = ol.Variable(4.0), ol.optimizers.Nadam(beta_1=0.5)
      >>> opt.minimize(lambda: 8 * v, [v])
      >>> print({x.name: x for x in opt.variables}["nadam/product"].round(5))
      0.26

    References:
      T. Dozat, "Incorporating Nesterov Momentum into Adam", 2016,
      https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, algorithm 2, except that the mean there
      decays by μₜ, and v̂ has a factor β₂. Matches Keras 3 `Nadam`, and Keras 2.15 run eagerly:
      inside `tf.function`, and so in `fit`, that multiplies P once for every variable, and does
      not save it. `optax.nadam` has μ = β₁ throughout.
    """

    learning_rate: Rate = 0.001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        nadam = transforms.ScaleByNadam(self.beta_1, self.beta_2, self.epsilon)
        return {"nadam": nadam, "rate": ScaleByLearningRate(self.rate)}


class Adafactor(Optimizer):
    """Divide by a root mean square kept for rows and columns; step in proportion to p.

        q = g² + ε₁,   b = 1 - t^beta_2_decay,   t = 1, 2, …
        two axes or more:  r ← b r + (1-b) · mean of q over the last axis
                           c ← b c + (1-b) · mean of q over the last but one
                           V = r c / mean(r)
        fewer:             V ← b V + (1-b) q
        x = g / √V,   ρ = min(learning_rate, 1/√t)      (learning_rate without `relative_step`)
        p ← p - max(ε₂, rms(p)) · ρ · x / max(1, rms(x) / clip_threshold)

    rms is the root mean square of all entries. A matrix of n by m has n + m numbers of memory, and
    no V; a vector or a scalar has V. Of more than two axes, those before the last two count as
    many matrices. As b is 0 at first, no correction is needed. A zero gradient gives a zero step.
    Clipping and then weight decay, p ← p - learning_rate · weight_decay · p, come before the rule,
    which sees the decayed p; the average of the parameters comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0, relative to rms(p); a number or a schedule; 0.001.
      beta_2_decay: at most 0; 0 forgets all gradients but the newest.
      epsilon_1: ε₁, above 0, in the unit of the gradients squared.
      epsilon_2: ε₂, above 0, in the unit of the parameters: what rms(p) counts at least.
      clip_threshold: what rms(x) is at most, above 0. It has nothing to do with the options that
        clip gradients.
      relative_step: whether the rate, a schedule's too, is at most 1/√t.

    Example:
      All entries of the first x are 1 or -1, and rms(p) is 5:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> v, opt = ol.Variable([1.0, 7.0]), ol.optimizers.Adafactor(learning_rate=0.5)
      >>> opt.minimize(lambda: jnp.vdot(jnp.array([3.0, -0.25]), v), [v])
      >>> print(v.round(4))
      [-1.5  9.5]

    References:
      N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
      https://arxiv.org/abs/1804.04235, algorithms 4 to 6. Matches Keras 2.15 and Keras 3
      `Adafactor`, except that those cap the rate at 1/√t even with `relative_step=False`, store V
      of matrices too, and give NaN where a row and a column are both zero. Without the cap,
      vectors and matrices move as in `optax.adafactor(min_dim_size_to_factor=1)`; its default
      factors only axes of 128 and more, and of more than two axes it takes the two largest.
    """

    learning_rate: Rate = 0.001
    beta_2_decay: NotPositive = -0.8
    epsilon_1: Positive = 1e-30
    epsilon_2: Positive = 1e-3
    clip_threshold: Positive = 1.0
    relative_step: bool = True

    def links(self):
        """Return the rule, which has the rate."""
        adafactor = transforms.StepByAdafactor(
            self.rate,
            self.beta_2_decay,
            self.epsilon_1,
            self.epsilon_2,
            self.clip_threshold,
            self.relative_step,
        )
        return {"adafactor": adafactor}


class Ftrl(Optimizer):
    """Set each parameter to the point that would have been best for all gradients so far.

        n' = n + g²,   σ = (n'^-power - n^-power) / learning_rate
        z ← z + g + 2 · l2_shrinkage · p - σ · p
        p ← 0 if |z| ≤ l1, else (l1 · sign(z) - z) / ((n'^-power + beta) / learning_rate + 2 · l2)

    "Follow the regularised leader." z starts at 0, so the first step forgets the initial
    parameter. With l1 many parameters are exactly 0. Clipping and then weight decay,
    p ← p - learning_rate · weight_decay · p, come before the rule, which sees the decayed p; the
    average of the parameters comes after it.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: above 0; a number, or a schedule that does not reach 0; 0.001.
      learning_rate_power: power, at most 0; -1/2 as in the paper, 0 for a fixed rate.
      initial_accumulator_value: n before the first step, at least 0.
      l1_regularization_strength: l1, at least 0.
      l2_regularization_strength: l2, at least 0; keeps steps small, as a larger n does.
      l2_shrinkage_regularization_strength: l2_shrinkage, at least 0: a penalty on the parameters
        that does not enter n.
      beta: at least 0, as in the paper.

    Example:
      n grows from 9 to 25 and σ is 5 - 3, so z = 4 - 2 · 4, and p = 4 / 5:

      >>> import optimize_loss as ol
      >>> opt = ol.optimizers.Ftrl(learning_rate=1.0, initial_accumulator_value=9.0)
      >>> v = ol.Variable(4.0)
      >>> opt.minimize(lambda: 4 * v, [v])
      >>> print(f"{v:.3f}")
      0.800

    References:
      H. B. McMahan et al., "Ad Click Prediction: a View from the Trenches", 2013,
      https://research.google.com/pubs/archive/41159.pdf, algorithm 1, with 2 · l2 for its λ₂.
      Matches Keras 2.15 and Keras 3 `Ftrl`, and `tf.train.FtrlOptimizer` (here `FtrlOptimizer`),
      which needs a rate. optax has none.
    """

    learning_rate: PositiveRate = 0.001
    learning_rate_power: NotPositive = -0.5
    initial_accumulator_value: Start = 0.1
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0
    l2_shrinkage_regularization_strength: NotNegative = 0.0
    beta: NotNegative = 0.0

    def links(self):
        """Return the rule, which has the rate."""
        ftrl = transforms.StepByFtrl(
            self.rate,
            self.learning_rate_power,
            self.initial_accumulator_value,
            self.l1_regularization_strength,
            self.l2_regularization_strength,
            self.l2_shrinkage_regularization_strength,
            self.beta,
        )
        return {"ftrl": ftrl}


class Lion(Optimizer):
    """Move every entry by the rate, against the sign of a mean of the gradients.

        p ← p - learning_rate · sign(β₁ m + (1-β₁) g),   m ← β₂ m + (1-β₂) g

    m starts at 0. The newest gradient counts more in the step than in what is kept of it. Where the
    mean is 0, nothing moves. Clipping and then weight decay,
    p ← p - learning_rate · weight_decay · p, come before the rule; the average of the parameters
    comes after it. Because every entry moves by the full rate, the authors advise a rate 3 to 10
    times smaller, and a weight decay as many times larger, than AdamW's.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0, in the unit of the parameters; a number or a schedule; 0.0001.
      beta_1: β₁, in [0, 1); 0 takes the sign of the gradient alone.
      beta_2: β₂, in [0, 1).

    Example:
      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> v, opt = ol.Variable([1.0, 7.0]), ol.optimizers.Lion(learning_rate=0.25)
      >>> opt.minimize(lambda: jnp.vdot(jnp.array([3.0, -0.25]), v), [v])
      >>> print(v)
      [0.75 7.25]

    References:
      X. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
      https://arxiv.org/abs/2302.06675, algorithm 2. Matches Keras 2.15 `Lion` and its rate; that of
      Keras 3 is 0.001. Both refuse β₁ = 0 and take β₁ = 1, here it is the other way round.
      `optax.lion` is the same with a `weight_decay` of 1e-3 by default.
    """

    learning_rate: Rate = 0.0001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99

    def links(self):
        """Return the rule, then the rate."""
        lion = transforms.ScaleByLion(self.beta_1, self.beta_2)
        return {"lion": lion, "rate": ScaleByLearningRate(self.rate)}


class Lamb(Optimizer):
    """Give Adam's update of each parameter the norm of that parameter.

        m ← m + (1-β₁)(g - m),   v ← v + (1-β₂)(g² - v),   t = 1, 2, …
        u = m / (1-β₁ᵗ) / (√(v / (1-β₂ᵗ)) + ε)
        p ← p - learning_rate · r · u,   r = ‖p‖ / ‖u‖, or 1 where ‖p‖ or ‖u‖ is 0

    So the rate is the relative change of a parameter: 0.01 moves each by 1% of its L2 norm. ε is
    added to the root of the corrected v, not as in `Adam`. Clipping and then weight decay,
    p ← p - learning_rate · weight_decay · p, come before the rule, which sees the decayed p; the
    decay itself is no part of u, and r does not rescale it. The average of the parameters comes
    after the rule.

    The keyword options, the same for all optimizers, are described in `Optimizer`.

    Args:
      learning_rate: at least 0, relative to ‖p‖; a number or a schedule; 0.001.
      beta_1: β₁, in [0, 1).
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.

    Example:
      Adam's first step, (0, 1), becomes half as long as (3, 4):

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> v, opt = ol.Variable([3.0, 4.0]), ol.optimizers.Lamb(learning_rate=0.5)
      >>> opt.minimize(lambda: jnp.vdot(jnp.array([0.0, 7.0]), v), [v])
      >>> print(v.round(4))
      [3.  1.5]

    References:
      Y. You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
      2020, https://arxiv.org/abs/1904.00962, algorithm 2, with φ(x) = x, where the decay is part of
      u, and so of r, as in `optax.lamb`. Matches Keras 3 `Lamb`; Keras 2.15 has none. Without decay
      `optax.lamb`, whose ε is 1e-6, is the same.
    """

    learning_rate: Rate = 0.001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        lamb = transforms.ScaleByLamb(self.beta_1, self.beta_2, self.epsilon)
        return {"lamb": lamb, "rate": ScaleByLearningRate(self.rate)}


class ScheduleFreeAdamW(Optimizer):
    """Let Adam move z, and take gradients between z and the mean x of all z so far.

        v ← v + (1-β₂)(g² - v),   t = 1, 2, …
        z ← z - learning_rate · min(t / warmup_steps, 1) · g / (√(v / (1-β₂ᵗ)) + ε)
        x ← x + (z - x) / t
        p ← (1-β₁) z + β₁ x

    z and x start as copies of p. The mean takes the place of a rate that decays, and β₁ that of a
    momentum. p is what is trained; x is what to evaluate and to keep:
    `finalize_variable_values` puts it in the place of p. Memory has z and v; x follows from p
    and z. So what else changes p changes x: weight decay, p ← p - learning_rate · weight_decay · p,
    which comes before the rule and behind clipping, moves p and not z. With `use_ema`,
    `finalize_variable_values` gives the average of p instead.

    The keyword options, the same for all optimizers, are described in `Optimizer`. Despite the
    name, `weight_decay` is None unless given.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.0025.
      beta_1: β₁, in (0, 1); a number and no schedule.
      beta_2: β₂, in [0, 1).
      epsilon: ε, above 0, in the unit of the gradients.
      warmup_steps: updates in which the rate rises, an integer of at least 0; in the first of n it
        is 1/n of `learning_rate`, from the nth on all of it.

    Example:
      z goes 1.5, 1, 0.5; x is their mean, and p nine tenths of the way from z to x:

      >>> import optimize_loss as ol
      >>> v, opt = ol.Variable(2.0), ol.optimizers.ScheduleFreeAdamW(learning_rate=0.5)
      >>> for _ in range(3):
      ...     opt.minimize(lambda: 4 * v, [v])
      >>> print(v.round(4))
      0.95
      >>> opt.finalize_variable_values([v])
      >>> print(v.round(4))
      1.0

    References:
      A. Defazio et al., "The Road Less Scheduled", 2024, https://arxiv.org/abs/2405.15682,
      algorithm 1, except that there, as in `optax.contrib.schedule_free_adamw`, the mean has the
      squares of the rates as weights, a difference only where the rate changes, and weight decay
      moves z. Matches Keras 3 `ScheduleFreeAdamW` on JAX, whose `finalize_variable_values` leaves p
      as it is; on TensorFlow, Keras 3.15.1 takes the new z for the old. Keras 2.15 has none.
    """

    learning_rate: Rate = 0.0025
    beta_1: Annotated[float, INNER_DECAY] = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-8
    warmup_steps: Annotated[int, STEP] = 0

    def links(self):
        """Return the rule, which has the rate."""
        rule = transforms.StepByScheduleFree(
            self.rate, self.beta_1, self.beta_2, self.epsilon, self.warmup_steps
        )
        return {"schedule_free": rule}
