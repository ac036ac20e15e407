"""One call turns a loss and an optimizer into a compiled JAX training step."""

from optimize_loss import _interrupted as _interrupted
from optimize_loss import optimizers as optimizers
from optimize_loss import plot as plot
from optimize_loss import schedules as schedules
from optimize_loss import transforms as transforms
from optimize_loss._build import optimize_loss as optimize_loss
from optimize_loss._checkpoint import RestoreReport as RestoreReport
from optimize_loss._checkpoint import restore as restore
from optimize_loss._checkpoint import save as save
from optimize_loss._checkpoints import Checkpoints as Checkpoints
from optimize_loss._checks import CheckpointCorrupt as CheckpointCorrupt
from optimize_loss._checks import CheckpointMismatch as CheckpointMismatch
from optimize_loss._checks import CheckpointVersion as CheckpointVersion
from optimize_loss._checks import InvalidType as InvalidType
from optimize_loss._checks import NonFiniteError as NonFiniteError
from optimize_loss._checks import TreeMismatch as TreeMismatch
from optimize_loss._found import LearningRateTest as LearningRateTest
from optimize_loss._found import Sweep as Sweep
from optimize_loss._loss import Aux as Aux
from optimize_loss._metrics import OPTIMIZER_SUMMARIES as OPTIMIZER_SUMMARIES
from optimize_loss._options import adaptive_clipping_fn as adaptive_clipping_fn
from optimize_loss._state import TrainState as TrainState
from optimize_loss._state_dict import from_state_dict as from_state_dict
from optimize_loss._state_dict import to_state_dict as to_state_dict
from optimize_loss._train_step import TrainStep as TrainStep
from optimize_loss.optimizers._tf1 import OPTIMIZER_CLS_NAMES as OPTIMIZER_CLS_NAMES
from optimize_loss.optimizers._variable import Variable as Variable
from optimize_loss.transforms._guard import SkipSpikes as Spike
from optimize_loss.transforms._precision import Precision as Precision

__all__ = [
    "OPTIMIZER_CLS_NAMES",
    "OPTIMIZER_SUMMARIES",
    "Aux",
    "CheckpointCorrupt",
    "CheckpointMismatch",
    "CheckpointVersion",
    "Checkpoints",
    "InvalidType",
    "LearningRateTest",
    "NonFiniteError",
    "Precision",
    "RestoreReport",
    "Spike",
    "Sweep",
    "TrainState",
    "TrainStep",
    "TreeMismatch",
    "Variable",
    "adaptive_clipping_fn",
    "from_state_dict",
    "optimize_loss",
    "optimizers",
    "plot",
    "restore",
    "save",
    "schedules",
    "to_state_dict",
    "transforms",
]

__version__ = "0.1.0"
