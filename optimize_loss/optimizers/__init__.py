"""Optimizers by class: options that become a chain of links."""

from optimize_loss.optimizers._declaration import deserialize as deserialize
from optimize_loss.optimizers._declaration import serialize as serialize
from optimize_loss.optimizers._keras import SGD as SGD
from optimize_loss.optimizers._keras import Adadelta as Adadelta
from optimize_loss.optimizers._keras import Adafactor as Adafactor
from optimize_loss.optimizers._keras import Adagrad as Adagrad
from optimize_loss.optimizers._keras import Adam as Adam
from optimize_loss.optimizers._keras import Adamax as Adamax
from optimize_loss.optimizers._keras import AdamW as AdamW
from optimize_loss.optimizers._keras import Ftrl as Ftrl
from optimize_loss.optimizers._keras import Lamb as Lamb
from optimize_loss.optimizers._keras import Lion as Lion
from optimize_loss.optimizers._keras import Nadam as Nadam
from optimize_loss.optimizers._keras import RMSprop as RMSprop
from optimize_loss.optimizers._keras import ScheduleFreeAdamW as ScheduleFreeAdamW
from optimize_loss.optimizers._multi import LossScaleOptimizer as LossScaleOptimizer
from optimize_loss.optimizers._multi import MultiOptimizer as MultiOptimizer
from optimize_loss.optimizers._muon import Muon as Muon
from optimize_loss.optimizers._optimizer import Optimizer as Optimizer
from optimize_loss.optimizers._resolve import get as get
from optimize_loss.optimizers._resolve import names as names
from optimize_loss.optimizers._tf1 import AdadeltaOptimizer as AdadeltaOptimizer
from optimize_loss.optimizers._tf1 import AdagradDAOptimizer as AdagradDAOptimizer
from optimize_loss.optimizers._tf1 import AdagradOptimizer as AdagradOptimizer
from optimize_loss.optimizers._tf1 import AdamOptimizer as AdamOptimizer
from optimize_loss.optimizers._tf1 import FtrlOptimizer as FtrlOptimizer
from optimize_loss.optimizers._tf1 import GradientDescentOptimizer as GradientDescentOptimizer
from optimize_loss.optimizers._tf1 import MomentumOptimizer as MomentumOptimizer
from optimize_loss.optimizers._tf1 import ProximalAdagradOptimizer as ProximalAdagradOptimizer
from optimize_loss.optimizers._tf1 import (
    ProximalGradientDescentOptimizer as ProximalGradientDescentOptimizer,
)
from optimize_loss.optimizers._tf1 import RMSPropOptimizer as RMSPropOptimizer

__all__ = [
    "SGD",
    "Adadelta",
    "AdadeltaOptimizer",
    "Adafactor",
    "Adagrad",
    "AdagradDAOptimizer",
    "AdagradOptimizer",
    "Adam",
    "AdamOptimizer",
    "AdamW",
    "Adamax",
    "Ftrl",
    "FtrlOptimizer",
    "GradientDescentOptimizer",
    "Lamb",
    "Lion",
    "LossScaleOptimizer",
    "MomentumOptimizer",
    "MultiOptimizer",
    "Muon",
    "Nadam",
    "Optimizer",
    "ProximalAdagradOptimizer",
    "ProximalGradientDescentOptimizer",
    "RMSPropOptimizer",
    "RMSprop",
    "ScheduleFreeAdamW",
    "deserialize",
    "get",
    "names",
    "serialize",
]
