"""Keras' Muon: one rule for matrices, Adam for the rest."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from optimize_loss._names import Pattern, any_matches, check_patterns
from optimize_loss.optimizers._base import Optimizer
from optimize_loss.optimizers._options import Rate
from optimize_loss.transforms import (
    Count,
    Decay,
    Finite,
    ForParameters,
    Fraction,
    Link,
    NotNegative,
    Positive,
    ScaleByAdam,
    ScaleByLearningRate,
    ScaleByMuon,
    ShrinkParams,
)


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Tells the parameters that Muon's own rule is for, or those that it is not for.

    Args:
      exclude_layers: regular expressions searched for in names.
      exclude_embeddings: whether names with `embedding` in them are not Muon's.
      others: whether to tell those that are not Muon's.
      unless: names or patterns of parameters that are told in neither case.
    """

    exclude_layers: tuple[re.Pattern[str], ...]
    exclude_embeddings: bool
    others: bool = False
    unless: tuple[Pattern, ...] = ()

    def takes(self, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
        """Return for each parameter whether it is meant; raise if a pattern matches none."""
        layers = any_matches("exclude_layers", self.exclude_layers, names)
        unless = any_matches("exclude_from_weight_decay", self.unless, names)
        embeddings = [self.exclude_embeddings and "embedding" in name.lower() for name in names]
        excluded = zip(leaves, layers, embeddings, strict=True)
        others = [len(x.shape) != 2 or layer or embedding for x, layer, embedding in excluded]
        return [o == self.others and not u for o, u in zip(others, unless, strict=True)]


@dataclasses.dataclass(frozen=True)
class MultiplyByRatio(Link):
    """Multiply the updates that are Adam's, of which there may be none."""

    adam_lr_ratio: NotNegative
    elementwise = True

    def factor(self, k):
        """Return the ratio."""
        return k["adam_lr_ratio"]


class Muon(Optimizer):
    """Muon."""

    learning_rate: Rate = 0.001
    adam_beta_1: Decay = 0.9
    adam_beta_2: Decay = 0.999
    adam_weight_decay: NotNegative | None = 0.004
    epsilon: Positive = 1e-7
    _: dataclasses.KW_ONLY
    weight_decay: NotNegative | None = 0.004
    exclude_layers: Sequence[str] = ()
    exclude_embeddings: bool = True
    muon_a: Finite = 3.4445
    muon_b: Finite = -4.7750
    muon_c: Finite = 2.0315
    adam_lr_ratio: NotNegative = 1.0
    momentum: Fraction = 0.95
    ns_steps: Count = 5
    nesterov: bool = True
    rms_rate: NotNegative | None = 0.2

    def _where(self, others: bool, unless: tuple[Pattern, ...] = ()) -> Matrices:
        layers = check_patterns("exclude_layers", self.exclude_layers)
        searched = tuple(re.compile(layer) for layer in layers)
        return Matrices(searched, self.exclude_embeddings, others, unless)

    def decay_links(self, exclude):
        """Return a decay for matrices and one for the others."""
        decays = {
            "weight_decay": (self._where(False, exclude), self.weight_decay),
            "adam_weight_decay": (self._where(True, exclude), self.adam_weight_decay),
        }
        return {
            name: ForParameters(where, ShrinkParams(decay), optional=True)
            for name, (where, decay) in decays.items()
            if decay is not None
        }

    def links(self):
        """Return the rule for matrices, Adam for the others, and the rate."""
        muon = ScaleByMuon(
            self.momentum,
            self.nesterov,
            self.ns_steps,
            self.muon_a,
            self.muon_b,
            self.muon_c,
            self.rms_rate,
        )
        adam = ScaleByAdam(self.adam_beta_1, self.adam_beta_2, self.epsilon)
        ratio = MultiplyByRatio(self.adam_lr_ratio)
        matrices, others = self._where(False), self._where(True)
        return {
            "muon": ForParameters(matrices, muon, optional=True),
            "adam": ForParameters(others, adam, optional=True),
            "adam_lr_ratio": ForParameters(others, ratio, optional=True),
            "rate": ScaleByLearningRate(self.rate),
        }
