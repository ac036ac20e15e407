"""Gradient transformations: links, and the chain that runs them in one pass."""

from optimize_loss._engine.chain import Chain as Chain
from optimize_loss._engine.chain import chain as chain
from optimize_loss._engine.kinds import Averaging as Averaging
from optimize_loss._engine.kinds import Gate as Gate
from optimize_loss._engine.link import Count as Count
from optimize_loss._engine.link import Decay as Decay
from optimize_loss._engine.link import Finite as Finite
from optimize_loss._engine.link import Fraction as Fraction
from optimize_loss._engine.link import FullDecay as FullDecay
from optimize_loss._engine.link import Link as Link
from optimize_loss._engine.link import NotNegative as NotNegative
from optimize_loss._engine.link import NotPositive as NotPositive
from optimize_loss._engine.link import Positive as Positive
from optimize_loss._engine.link import PositiveStart as PositiveStart
from optimize_loss._engine.link import Seed as Seed
from optimize_loss._engine.link import Start as Start
from optimize_loss._engine.link import TreeLink as TreeLink
from optimize_loss._engine.precision import Precision as Precision
from optimize_loss._engine.selection import ForParameters as ForParameters
from optimize_loss.transforms._accumulate import Accumulate as Accumulate
from optimize_loss.transforms._accumulate import SumOverAxis as SumOverAxis
from optimize_loss.transforms._adafactor import StepByAdafactor as StepByAdafactor
from optimize_loss.transforms._adagrad import ScaleByAdagrad as ScaleByAdagrad
from optimize_loss.transforms._adam import ScaleByAdam as ScaleByAdam
from optimize_loss.transforms._adamax import ScaleByAdamax as ScaleByAdamax
from optimize_loss.transforms._average import AverageLoss as AverageLoss
from optimize_loss.transforms._average import AverageParams as AverageParams
from optimize_loss.transforms._clip import ClipByAdaptiveNorm as ClipByAdaptiveNorm
from optimize_loss.transforms._clip import ClipByFunction as ClipByFunction
from optimize_loss.transforms._clip import ClipByGlobalNorm as ClipByGlobalNorm
from optimize_loss.transforms._clip import ClipByNorm as ClipByNorm
from optimize_loss.transforms._clip import ClipByValue as ClipByValue
from optimize_loss.transforms._ftrl import StepByFtrl as StepByFtrl
from optimize_loss.transforms._guard import SkipNonFinite as SkipNonFinite
from optimize_loss.transforms._guard import SkipSpikes as SkipSpikes
from optimize_loss.transforms._lamb import ScaleByLamb as ScaleByLamb
from optimize_loss.transforms._lion import ScaleByLion as ScaleByLion
from optimize_loss.transforms._lookahead import Lookahead as Lookahead
from optimize_loss.transforms._loss_scale import (
    DivideByDynamicLossScale as DivideByDynamicLossScale,
)
from optimize_loss.transforms._loss_scale import DivideByLossScale as DivideByLossScale
from optimize_loss.transforms._momentum import ScaleByMomentum as ScaleByMomentum
from optimize_loss.transforms._multiply import MultiplyGradients as MultiplyGradients
from optimize_loss.transforms._muon import ScaleByMuon as ScaleByMuon
from optimize_loss.transforms._nadam import ScaleByNadam as ScaleByNadam
from optimize_loss.transforms._noise import AddNoise as AddNoise
from optimize_loss.transforms._observe import ObserveHistograms as ObserveHistograms
from optimize_loss.transforms._observe import ObserveNorm as ObserveNorm
from optimize_loss.transforms._observe import ObserveNorms as ObserveNorms
from optimize_loss.transforms._plateau import ReduceOnPlateau as ReduceOnPlateau
from optimize_loss.transforms._proximal import StepByDualAveraging as StepByDualAveraging
from optimize_loss.transforms._proximal import StepByProximalAdagrad as StepByProximalAdagrad
from optimize_loss.transforms._proximal import StepByProximalGradient as StepByProximalGradient
from optimize_loss.transforms._rate import ScaleByLearningRate as ScaleByLearningRate
from optimize_loss.transforms._rms import ScaleByAdadelta as ScaleByAdadelta
from optimize_loss.transforms._rms import ScaleByRMS as ScaleByRMS
from optimize_loss.transforms._rounding import RoundParams as RoundParams
from optimize_loss.transforms._rounding import with_precision as with_precision
from optimize_loss.transforms._schedule_free import StepByScheduleFree as StepByScheduleFree
from optimize_loss.transforms._weight_decay import AddWeightDecay as AddWeightDecay
from optimize_loss.transforms._weight_decay import ShrinkParams as ShrinkParams

__all__ = [
    "Accumulate",
    "AddNoise",
    "AddWeightDecay",
    "AverageLoss",
    "AverageParams",
    "Averaging",
    "Chain",
    "ClipByAdaptiveNorm",
    "ClipByFunction",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "Count",
    "Decay",
    "DivideByDynamicLossScale",
    "DivideByLossScale",
    "Finite",
    "ForParameters",
    "Fraction",
    "FullDecay",
    "Gate",
    "Link",
    "Lookahead",
    "MultiplyGradients",
    "NotNegative",
    "NotPositive",
    "ObserveHistograms",
    "ObserveNorm",
    "ObserveNorms",
    "Positive",
    "PositiveStart",
    "Precision",
    "ReduceOnPlateau",
    "RoundParams",
    "ScaleByAdadelta",
    "ScaleByAdagrad",
    "ScaleByAdam",
    "ScaleByAdamax",
    "ScaleByLamb",
    "ScaleByLearningRate",
    "ScaleByLion",
    "ScaleByMomentum",
    "ScaleByMuon",
    "ScaleByNadam",
    "ScaleByRMS",
    "Seed",
    "ShrinkParams",
    "SkipNonFinite",
    "SkipSpikes",
    "Start",
    "StepByAdafactor",
    "StepByDualAveraging",
    "StepByFtrl",
    "StepByProximalAdagrad",
    "StepByProximalGradient",
    "StepByScheduleFree",
    "SumOverAxis",
    "TreeLink",
    "chain",
    "with_precision",
]
