"""TensorFlow 1's optimizers, with its names, defaults and numbers."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from optimize_loss import transforms
from optimize_loss._checks import received
from optimize_loss.optimizers._declaration import PositiveRate, Rate
from optimize_loss.optimizers._optimizer import Optimizer
from optimize_loss.transforms import (
    Decay,
    Fraction,
    NotNegative,
    NotPositive,
    Positive,
    PositiveStart,
    ScaleByLearningRate,
    Start,
)


def _single(name: str, decay: Any) -> Any:
    """Return a decay rate as TensorFlow 1 sees it: rounded to float32 before 1-β is taken."""
    if not isinstance(decay, float):
        return decay
    rounded = float(np.float32(decay))
    if rounded == 1:
        raise ValueError(f"`{name}` must be below 1 as a float32. {received(name, decay)}")
    return rounded


def _regularization(optimizer: Any) -> tuple[float, float]:
    return optimizer.l1_regularization_strength, optimizer.l2_regularization_strength


class GradientDescentOptimizer(Optimizer):
    """Gradient descent: p ← p - learning_rate · g.

    Args:
      learning_rate: at least 0; a number or a schedule.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.GradientDescentOptimizer(0.5)
      >>> print(tx.update({"w": 2.0}, tx.init({"w": 0.0}))[0]["w"])
      -1.0

    References:
      `tf.compat.v1.train.GradientDescentOptimizer`.
    """

    learning_rate: Rate

    def links(self):
        """Return the rate."""
        return {"rate": ScaleByLearningRate(self.rate)}


class MomentumOptimizer(Optimizer):
    """Momentum, with the rate outside the accumulator: a ← momentum · a + g, p ← p - rate · a.

    Args:
      learning_rate: at least 0; a number or a schedule.
      momentum: share of the accumulator that is kept, in [0, 1].
      use_nesterov: p ← p - rate · (g + momentum · a) instead.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.MomentumOptimizer(0.1, momentum=0.5)
      >>> state = tx.init({"w": 0.0})
      >>> first, state = tx.update({"w": 2.0}, state)
      >>> second, state = tx.update({"w": 2.0}, state)
      >>> print(first["w"].round(6), second["w"].round(6))
      -0.2 -0.3

    References:
      `tf.compat.v1.train.MomentumOptimizer`; `ScaleByMomentum` has the paper.
    """

    learning_rate: Rate
    momentum: Fraction
    use_nesterov: bool = False

    def links(self):
        """Return the accumulator, then the rate."""
        momentum = transforms.ScaleByMomentum(self.momentum, self.use_nesterov)
        return {"momentum": momentum, "rate": ScaleByLearningRate(self.rate)}


class AdamOptimizer(Optimizer):
    """Adam, with epsilon added to the root that is not corrected: `ScaleByAdam`.

    Args:
      learning_rate: at least 0; a number or a schedule.
      beta1: decay of the mean of gradients, in [0, 1).
      beta2: decay of the mean of their squares, in [0, 1).
      epsilon: above 0, in the unit of the gradients.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.AdamOptimizer(0.1, epsilon=0.1)
      >>> print(tx.update({"w": 1.0}, tx.init({"w": 0.0}))[0]["w"].round(6))
      -0.024025

    References:
      `tf.compat.v1.train.AdamOptimizer`; `ScaleByAdam` has the paper.
    """

    learning_rate: Rate = 0.001
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    epsilon: Positive = 1e-8

    def links(self):
        """Return the rule, then the rate."""
        adam = transforms.ScaleByAdam(
            _single("beta1", self.beta1), _single("beta2", self.beta2), self.epsilon
        )
        return {"adam": adam, "rate": ScaleByLearningRate(self.rate)}


class AdagradOptimizer(Optimizer):
    """Adagrad without epsilon: n ← n + g², p ← p - learning_rate · g / √n.

    Args:
      learning_rate: at least 0; a number or a schedule.
      initial_accumulator_value: n before the first step, above 0.

    Raises:
      ValueError: `initial_accumulator_value` is 0: a zero gradient would be divided by zero.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.AdagradOptimizer(0.5, initial_accumulator_value=9.0)
      >>> print(tx.update({"w": 4.0}, tx.init({"w": 0.0}))[0]["w"].round(6))
      -0.4

    References:
      `tf.compat.v1.train.AdagradOptimizer`; `ScaleByAdagrad` has the paper.
    """

    learning_rate: Rate
    initial_accumulator_value: PositiveStart = 0.1

    def links(self):
        """Return the rule, then the rate."""
        adagrad = transforms.ScaleByAdagrad(self.initial_accumulator_value, epsilon=0.0)
        return {"adagrad": adagrad, "rate": ScaleByLearningRate(self.rate)}


class AdadeltaOptimizer(Optimizer):
    """Adadelta: `ScaleByAdadelta`, multiplied by the rate.

    Args:
      learning_rate: at least 0; a number or a schedule; 1 is the paper's.
      rho: decay of both means of squares, in [0, 1).
      epsilon: above 0, in the unit of the parameters squared.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.AdadeltaOptimizer(1.0, rho=0.75, epsilon=1e-6)
      >>> print(tx.update({"w": 3.0}, tx.init({"w": 0.0}))[0]["w"].round(6))
      -0.002

    References:
      `tf.compat.v1.train.AdadeltaOptimizer`; `ScaleByAdadelta` has the paper.
    """

    learning_rate: Rate = 0.001
    rho: Decay = 0.95
    epsilon: Positive = 1e-8

    def links(self):
        """Return the rule, then the rate."""
        adadelta = transforms.ScaleByAdadelta(_single("rho", self.rho), self.epsilon)
        return {"adadelta": adadelta, "rate": ScaleByLearningRate(self.rate)}


class RMSPropOptimizer(Optimizer):
    """RMSprop whose mean of squares starts at 1, with the rate inside the momentum.

        s ← s + (1 - decay)(g² - s),   a ← momentum · a + learning_rate · g / √(s + epsilon),
        p ← p - a

    Args:
      learning_rate: at least 0; a number or a schedule.
      decay: decay of the mean of squares, in [0, 1).
      momentum: share of the accumulator a that is kept, in [0, 1].
      epsilon: above 0, in the unit of the gradients squared.
      centered: whether to divide by the standard deviation.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.RMSPropOptimizer(0.5, decay=0.5)
      >>> print(tx.update({"w": 7.0}, tx.init({"w": 0.0}))[0]["w"].round(6))
      -0.7

    References:
      `tf.compat.v1.train.RMSPropOptimizer`; `ScaleByRMS` has the papers.
    """

    learning_rate: Rate
    decay: Decay = 0.9
    momentum: Fraction = 0.0
    epsilon: Positive = 1e-10
    centered: bool = False

    def links(self):
        """Return the rule, the rate, and the momentum."""
        return {
            "rms": transforms.ScaleByRMS(
                _single("decay", self.decay), self.epsilon, self.centered, 1.0
            ),
            "rate": ScaleByLearningRate(self.rate),
            "momentum": transforms.ScaleByMomentum(self.momentum),
        }


class FtrlOptimizer(Optimizer):
    """Follow the regularised leader: `StepByFtrl`.

    Args:
      learning_rate: above 0; a number or a schedule.
      learning_rate_power: at most 0.
      initial_accumulator_value: at least 0.
      l1_regularization_strength: at least 0.
      l2_regularization_strength: at least 0.
      l2_shrinkage_regularization_strength: at least 0.
      beta: at least 0.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.FtrlOptimizer(1.0, initial_accumulator_value=9.0)
      >>> print(tx.update({"w": 4.0}, tx.init({"w": 0.0}), {"w": 0.0})[0]["w"].round(6))
      -0.8

    References:
      `tf.compat.v1.train.FtrlOptimizer`; `StepByFtrl` has the paper.
    """

    learning_rate: PositiveRate
    learning_rate_power: NotPositive = -0.5
    initial_accumulator_value: Start = 0.1
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0
    l2_shrinkage_regularization_strength: NotNegative = 0.0
    beta: NotNegative = 0.0

    def links(self):
        """Return the rule, which contains the rate."""
        return {
            "ftrl": transforms.StepByFtrl(
                self.rate,
                self.learning_rate_power,
                self.initial_accumulator_value,
                *_regularization(self),
                self.l2_shrinkage_regularization_strength,
                self.beta,
            )
        }


class ProximalGradientDescentOptimizer(Optimizer):
    """Gradient descent that meets an L1 and an L2 penalty exactly: `StepByProximalGradient`.

    Args:
      learning_rate: at least 0; a number or a schedule.
      l1_regularization_strength: at least 0.
      l2_regularization_strength: at least 0.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.ProximalGradientDescentOptimizer(1.0, 0.5)
      >>> print(tx.update({"w": 0.5}, tx.init({"w": 2.0}), {"w": 2.0})[0]["w"])
      -1.0

    References:
      `tf.compat.v1.train.ProximalGradientDescentOptimizer`.
    """

    learning_rate: Rate
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0

    def links(self):
        """Return the rule, which contains the rate."""
        return {"proximal": transforms.StepByProximalGradient(self.rate, *_regularization(self))}


class ProximalAdagradOptimizer(Optimizer):
    """Adagrad that meets an L1 and an L2 penalty exactly: `StepByProximalAdagrad`.

    Args:
      learning_rate: at least 0; a number or a schedule.
      initial_accumulator_value: above 0.
      l1_regularization_strength: at least 0.
      l2_regularization_strength: at least 0.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.ProximalAdagradOptimizer(1.0, 9.0)
      >>> print(tx.update({"w": 4.0}, tx.init({"w": 2.0}), {"w": 2.0})[0]["w"].round(6))
      -0.8

    References:
      `tf.compat.v1.train.ProximalAdagradOptimizer`.
    """

    learning_rate: Rate
    initial_accumulator_value: PositiveStart = 0.1
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0

    def links(self):
        """Return the rule, which contains the rate."""
        return {
            "proximal": transforms.StepByProximalAdagrad(
                self.rate, self.initial_accumulator_value, *_regularization(self)
            )
        }


class AdagradDAOptimizer(Optimizer):
    """Adagrad with dual averaging: `StepByDualAveraging`.

    TensorFlow's second argument, `global_step`, does not exist: the chain counts its updates.

    Args:
      learning_rate: at least 0; a number or a schedule.
      initial_gradient_squared_accumulator_value: above 0.
      l1_regularization_strength: at least 0.
      l2_regularization_strength: at least 0.

    Example:
      >>> import optimize_loss as ol
      >>> tx = ol.optimizers.AdagradDAOptimizer(1.0, 9.0)
      >>> print(tx.update({"w": 4.0}, tx.init({"w": 7.0}), {"w": 7.0})[0]["w"].round(6))
      -7.8

    References:
      `tf.compat.v1.train.AdagradDAOptimizer`; `StepByDualAveraging` has the paper.
    """

    learning_rate: Rate
    initial_gradient_squared_accumulator_value: PositiveStart = 0.1
    l1_regularization_strength: NotNegative = 0.0
    l2_regularization_strength: NotNegative = 0.0

    def links(self):
        """Return the rule, which contains the rate."""
        return {
            "dual_averaging": transforms.StepByDualAveraging(
                self.rate,
                self.initial_gradient_squared_accumulator_value,
                *_regularization(self),
            )
        }


OPTIMIZER_CLS_NAMES: dict[str, Callable[..., Optimizer]] = {
    "Adagrad": AdagradOptimizer,
    "Adam": AdamOptimizer,
    "Ftrl": FtrlOptimizer,
    "Momentum": functools.partial(MomentumOptimizer, momentum=0.9),
    "RMSProp": RMSPropOptimizer,
    "SGD": GradientDescentOptimizer,
}
"""contrib's names of optimizers; each makes one from a learning rate."""
