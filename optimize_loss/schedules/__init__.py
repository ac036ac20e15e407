"""Schedules: functions of the step that give the rate at that step.

TF1's functions `decay(learning_rate, global_step, …)` hold the arithmetic and fit
`learning_rate_decay_fn`; the classes are values, called as `schedule(step)`. Both take the step as
a number or a traced scalar, compute in float32 and give an array without dimensions; for many
steps use `jax.vmap(schedule)(steps)`. A function whose rate is a float64 array computes in float64.
"""

from optimize_loss.schedules._classes import CosineDecay as CosineDecay
from optimize_loss.schedules._classes import CosineDecayRestarts as CosineDecayRestarts
from optimize_loss.schedules._classes import ExponentialDecay as ExponentialDecay
from optimize_loss.schedules._classes import InverseSquareRootDecay as InverseSquareRootDecay
from optimize_loss.schedules._classes import InverseTimeDecay as InverseTimeDecay
from optimize_loss.schedules._classes import Join as Join
from optimize_loss.schedules._classes import OneCycle as OneCycle
from optimize_loss.schedules._classes import PiecewiseConstantDecay as PiecewiseConstantDecay
from optimize_loss.schedules._classes import PolynomialDecay as PolynomialDecay
from optimize_loss.schedules._classes import WarmUpDecay as WarmUpDecay
from optimize_loss.schedules._classes import WarmupStableDecay as WarmupStableDecay
from optimize_loss.schedules._config import LearningRateSchedule as LearningRateSchedule
from optimize_loss.schedules._evaluate import Decayed as Decayed
from optimize_loss.schedules._evaluate import evaluate as evaluate
from optimize_loss.schedules._functions import cosine_decay as cosine_decay
from optimize_loss.schedules._functions import cosine_decay_restarts as cosine_decay_restarts
from optimize_loss.schedules._functions import exponential_decay as exponential_decay
from optimize_loss.schedules._functions import inverse_time_decay as inverse_time_decay
from optimize_loss.schedules._functions import linear_cosine_decay as linear_cosine_decay
from optimize_loss.schedules._functions import natural_exp_decay as natural_exp_decay
from optimize_loss.schedules._functions import piecewise_constant as piecewise_constant
from optimize_loss.schedules._functions import polynomial_decay as polynomial_decay

__all__ = [
    "CosineDecay",
    "CosineDecayRestarts",
    "Decayed",
    "ExponentialDecay",
    "InverseSquareRootDecay",
    "InverseTimeDecay",
    "Join",
    "LearningRateSchedule",
    "OneCycle",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "WarmUpDecay",
    "WarmupStableDecay",
    "cosine_decay",
    "cosine_decay_restarts",
    "evaluate",
    "exponential_decay",
    "inverse_time_decay",
    "linear_cosine_decay",
    "natural_exp_decay",
    "piecewise_constant",
    "polynomial_decay",
]
