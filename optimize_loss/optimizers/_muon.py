"""Keras' Muon: one rule for matrices, Adam for the rest."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from optimize_loss import transforms
from optimize_loss._names import Pattern, any_matches, check_patterns
from optimize_loss.optimizers._declaration import Rate
from optimize_loss.optimizers._optimizer import Optimizer
from optimize_loss.transforms import (
    Count,
    Decay,
    Finite,
    ForParameters,
    Fraction,
    NotNegative,
    Positive,
)
from optimize_loss.transforms._muon import in_stacks


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Selects the parameters that Muon's own rule is for, or those that it is not for.

    Args:
      exclude_layers: regular expressions searched for in names.
      exclude_embeddings: whether names with `embedding` in them are not Muon's.
      others: whether to select those that are not Muon's.
      unless: names or patterns of parameters that are never selected.
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
        stacked = in_stacks(names, leaves)
        excluded = zip(leaves, layers, embeddings, stacked, strict=True)
        others = [len(x.shape) != 2 or any(why) for x, *why in excluded]
        return [o == self.others and not u for o, u in zip(others, unless, strict=True)]


@dataclasses.dataclass(frozen=True)
class MultiplyByRatio(transforms.Link):
    """Multiply the updates that are Adam's, of which there may be none."""

    adam_lr_ratio: NotNegative
    elementwise = True

    def factor(self, k):
        """Return the ratio."""
        return k["adam_lr_ratio"]


class Muon(Optimizer):
    """Update matrices by their orthogonalized momentum, and everything else by Adam.

        matrices:  a ← momentum · a + g,   u = a      (or g + momentum · a with `nesterov`)
                   X = u / (‖u‖ + 1e-7),   then ns_steps times:  A = X Xᵀ
                                                X ← muon_a X + (muon_b A + muon_c A²) X
                   p ← p - learning_rate · rms_rate · √max(rows, columns) · X
        others:    p ← p - adam_lr_ratio · (what `Adam` takes away)

    Muon's rule is for parameters with two axes, unless the name contains `embedding` or an
    expression of `exclude_layers`; the authors leave the last layer to Adam too. A bias of stacked
    layers has two axes and is no matrix: one whose first axis is also that of a parameter of three
    axes or more beside it, or in a subtree where all have this first axis. The matrices of stacked
    layers are Adam's, and `step.explain` warns of them. Clipping comes before the rules, then
    weight decay: `weight_decay` for matrices, `adam_weight_decay` for the others, both
    p ← p - learning_rate · decay · p whatever `adam_lr_ratio` is. The average of the parameters
    comes after the rules. `ScaleByMuon` describes X, and its precision.

    The keyword options, the same for all optimizers, are described in `Optimizer`. One default is
    Muon's own, that of `weight_decay`.

    Args:
      learning_rate: at least 0; a number or a schedule; 0.001.
      adam_beta_1: β₁ of Adam, in [0, 1).
      adam_beta_2: β₂ of Adam, in [0, 1).
      adam_weight_decay: decay of what is Adam's, at least 0, per unit of the learning rate; None
        for none.
      epsilon: ε of Adam, above 0, in the unit of the gradients.
      weight_decay: the same as `adam_weight_decay`, of what is Muon's.
      exclude_layers: regular expressions that are searched for in names. An expression that matches
        no name is a `ValueError`.
      exclude_embeddings: whether parameters with `embedding` in their names, large letters or
        small, are Adam's.
      muon_a: coefficient of X.
      muon_b: coefficient of X Xᵀ X.
      muon_c: coefficient of X Xᵀ X Xᵀ X.
      adam_lr_ratio: the factor of Adam's steps, at least 0.
      momentum: share of a that is kept each step, in [0, 1].
      ns_steps: number of rounds, an integer of at least 1. The defaults take all singular values
        of X from 0.01 up to between 0.68 and 1.14.
      nesterov: whether to look ahead by one step.
      rms_rate: root mean square of a step of full rank at a rate of 1, at least 0; about that of
        Adam's steps by default. None for p ← p - learning_rate · X.

    Example:
      The singular values 3 and 4, which are 0.6 and 0.8 in X, after one round of s ← 3/2 s - s³/2;
      the bias moves by Adam's first step:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> opt = ol.optimizers.Muon(1.0, ns_steps=1, muon_a=1.5, muon_b=-0.5, muon_c=0.0,
      ...                          rms_rate=None)
      >>> params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
      >>> grads = {"kernel": jnp.diag(jnp.array([3.0, 4.0])), "bias": jnp.array([5.0, -6.0])}
      >>> params = opt.apply(grads, params)
      >>> print(-jnp.diag(params["kernel"]).round(4), params["bias"].round(4))
      [0.792 0.944] [-1.  1.]

    References:
      K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
      https://kellerjordan.github.io/posts/muon/; J. Liu et al., "Muon is Scalable for LLM
      Training", 2025, https://arxiv.org/abs/2502.16982, section 2.2, for `rms_rate`. Matches
      Keras 3 `Muon`, which takes `exclude_layers=None` for no layers; Keras 2.15 has none.
      `optax.contrib.muon` divides a by its weight, scales X differently, and by default decays
      nothing.
    """

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
            name: ForParameters(where, transforms.ShrinkParams(decay), optional=True)
            for name, (where, decay) in decays.items()
            if decay is not None
        }

    def links(self):
        """Return the rule for matrices, Adam for the others, and the rate."""
        muon = transforms.ScaleByMuon(
            self.momentum,
            self.nesterov,
            self.ns_steps,
            self.muon_a,
            self.muon_b,
            self.muon_c,
            self.rms_rate,
        )
        adam = transforms.ScaleByAdam(self.adam_beta_1, self.adam_beta_2, self.epsilon)
        ratio = MultiplyByRatio(self.adam_lr_ratio)
        matrices, others = self._where(False), self._where(True)
        return {
            "muon": ForParameters(matrices, muon, optional=True),
            "adam": ForParameters(others, adam, optional=True),
            "adam_lr_ratio": ForParameters(others, ratio, optional=True),
            "rate": transforms.ScaleByLearningRate(self.rate),
        }
