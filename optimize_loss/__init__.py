"""One call turns a loss and an optimizer into a compiled JAX training step."""

from optimize_loss._demo import interrupted as _interrupted  # before all that takes long

# isort: split
from optimize_loss import optimizers as optimizers
from optimize_loss import plot as plot
from optimize_loss import schedules as schedules
from optimize_loss import transforms as transforms
from optimize_loss._checks import CheckpointCorrupt as CheckpointCorrupt
from optimize_loss._checks import CheckpointMismatch as CheckpointMismatch
from optimize_loss._checks import CheckpointVersion as CheckpointVersion
from optimize_loss._checks import InvalidType as InvalidType
from optimize_loss._checks import NonFiniteError as NonFiniteError
from optimize_loss._checks import StopRun as StopRun
from optimize_loss._checks import TreeMismatch as TreeMismatch
from optimize_loss._engine.precision import Precision as Precision
from optimize_loss._files.checkpoint import RestoreReport as RestoreReport
from optimize_loss._files.checkpoint import restore as restore
from optimize_loss._files.checkpoint import save as save
from optimize_loss._files.folder import Checkpoints as Checkpoints
from optimize_loss._files.named import from_state_dict as from_state_dict
from optimize_loss._files.named import to_state_dict as to_state_dict
from optimize_loss._search.results import LearningRateTest as LearningRateTest
from optimize_loss._search.results import Sweep as Sweep
from optimize_loss._state.hook import Hook as Hook
from optimize_loss._state.hook import every as every
from optimize_loss._state.loss import Aux as Aux
from optimize_loss._state.metrics import OPTIMIZER_SUMMARIES as OPTIMIZER_SUMMARIES
from optimize_loss._state.train_state import TrainState as TrainState
from optimize_loss._step.epochs import Epochs as Epochs
from optimize_loss._step.front import optimize_loss as optimize_loss
from optimize_loss._step.hooks import Evaluate as Evaluate
from optimize_loss._step.hooks import Profile as Profile
from optimize_loss._step.hooks import StopEarly as StopEarly
from optimize_loss._step.options import adaptive_clipping_fn as adaptive_clipping_fn
from optimize_loss._step.together import JointStep as JointStep
from optimize_loss._step.together import together as together
from optimize_loss._step.train_step import TrainStep as TrainStep
from optimize_loss._version import __version__ as __version__
from optimize_loss.optimizers._tf1 import OPTIMIZER_CLS_NAMES as OPTIMIZER_CLS_NAMES
from optimize_loss.optimizers._variable import Variable as Variable
from optimize_loss.transforms._guard import SkipSpikes as Spike

__all__ = [
    "OPTIMIZER_CLS_NAMES",
    "OPTIMIZER_SUMMARIES",
    "Aux",
    "CheckpointCorrupt",
    "CheckpointMismatch",
    "CheckpointVersion",
    "Checkpoints",
    "Epochs",
    "Evaluate",
    "Hook",
    "InvalidType",
    "JointStep",
    "LearningRateTest",
    "NonFiniteError",
    "Precision",
    "Profile",
    "RestoreReport",
    "Spike",
    "StopEarly",
    "StopRun",
    "Sweep",
    "TrainState",
    "TrainStep",
    "TreeMismatch",
    "Variable",
    "adaptive_clipping_fn",
    "every",
    "from_state_dict",
    "optimize_loss",
    "optimizers",
    "plot",
    "restore",
    "save",
    "schedules",
    "to_state_dict",
    "together",
    "transforms",
]

del _interrupted
