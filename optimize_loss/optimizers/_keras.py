"""Keras' optimizers, with its names, defaults and numbers."""

import dataclasses
from typing import Annotated

from optimize_loss import transforms
from optimize_loss._checks import INNER_DECAY, STEP
from optimize_loss.optimizers._base import Optimizer
from optimize_loss.optimizers._options import PositiveRate, Rate
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
    """Gradient descent, with momentum."""

    learning_rate: Rate = 0.01
    momentum: Fraction = 0.0
    nesterov: bool = False

    def links(self):
        """Return the rate, then the momentum."""
        momentum = transforms.ScaleByMomentum(self.momentum, self.nesterov)
        return {"rate": ScaleByLearningRate(self.rate), "momentum": momentum}


class RMSprop(Optimizer):
    """RMSprop."""

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
    """Adam."""

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
    """AdamW."""

    learning_rate: Rate = 0.001
    weight_decay: NotNegative | None = 0.004


class Adadelta(Optimizer):
    """Adadelta."""

    learning_rate: Rate = 0.001
    rho: Decay = 0.95
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        adadelta = transforms.ScaleByAdadelta(self.rho, self.epsilon)
        return {"adadelta": adadelta, "rate": ScaleByLearningRate(self.rate)}


class Adagrad(Optimizer):
    """Adagrad."""

    learning_rate: Rate = 0.001
    initial_accumulator_value: Start = 0.1
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        adagrad = transforms.ScaleByAdagrad(self.initial_accumulator_value, self.epsilon)
        return {"adagrad": adagrad, "rate": ScaleByLearningRate(self.rate)}


class Adamax(Optimizer):
    """Adamax."""

    learning_rate: Rate = 0.001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        adamax = transforms.ScaleByAdamax(self.beta_1, self.beta_2, self.epsilon)
        return {"adamax": adamax, "rate": ScaleByLearningRate(self.rate)}


class Nadam(Optimizer):
    """Nadam."""

    learning_rate: Rate = 0.001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        nadam = transforms.ScaleByNadam(self.beta_1, self.beta_2, self.epsilon)
        return {"nadam": nadam, "rate": ScaleByLearningRate(self.rate)}


class Adafactor(Optimizer):
    """Adafactor."""

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
    """Ftrl."""

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
    """Lion."""

    learning_rate: Rate = 0.0001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99

    def links(self):
        """Return the rule, then the rate."""
        lion = transforms.ScaleByLion(self.beta_1, self.beta_2)
        return {"lion": lion, "rate": ScaleByLearningRate(self.rate)}


class Lamb(Optimizer):
    """Lamb."""

    learning_rate: Rate = 0.001
    beta_1: Decay = 0.9
    beta_2: Decay = 0.999
    epsilon: Positive = 1e-7

    def links(self):
        """Return the rule, then the rate."""
        lamb = transforms.ScaleByLamb(self.beta_1, self.beta_2, self.epsilon)
        return {"lamb": lamb, "rate": ScaleByLearningRate(self.rate)}


class ScheduleFreeAdamW(Optimizer):
    """Schedule-free AdamW."""

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
