"""Muon: momentum made orthogonal."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType

from optimize_loss._checks import COUNT, check_integer
from optimize_loss._engine.arrays import sqrt, sum_of_squares, unit_of, zeros
from optimize_loss._engine.link import Finite, Fraction, Link, NotNegative, Numbers, Slots


@dataclasses.dataclass(frozen=True)
class ScaleByMuon(Link):
    """Replace a momentum matrix by the nearest orthogonal matrix.

        a ← momentum · a + g,   u = a      (or g + momentum · a with `nesterov`)
        X = u / (‖u‖ + 1e-7),   then ns_steps times:  A = X Xᵀ
                                                      X ← linear X + (cubic A + quintic A²) X
        update = rms_rate · √max(rows, columns) · X

    Each round sends every singular value s of X to linear s + cubic s³ + quintic s⁵. With the
    defaults five rounds take those from 0.01 to 1 to between 0.68 and 1.14. The entries of X then
    have a root mean square of about 1 / √max(rows, columns), and those of the update one of about
    `rms_rate`, as Adam's have: its rate and its weight decay fit. A zero matrix stays zero. Complex
    matrices: the conjugate transpose for Xᵀ.

    It is only for matrices: `ForParameters` gives the other parameters another rule. X is float32
    or wider, and its products have the precision that `jax.default_matmul_precision` sets. On a CPU
    that is full float32; GPUs and TPUs round the factors to fewer bits unless it is "highest". The
    authors compute all of X in bfloat16.

    Args:
      momentum: the share of the sum that is kept at each step, in [0, 1].
      nesterov: whether to look ahead by one step.
      ns_steps: number of rounds, at least 1.
      linear: coefficient of X.
      cubic: coefficient of X Xᵀ X.
      quintic: coefficient of X Xᵀ X Xᵀ X.
      rms_rate: the root mean square of an update of full rank, at least 0; None for X itself.

    Example:
      The singular values 3 and 4, which are 0.6 and 0.8 in X, after one round of s ← 3/2 s - s³/2:

      >>> import jax.numpy as jnp, optimize_loss as ol
      >>> tx = ol.transforms.chain(muon=ol.transforms.ScaleByMuon(
      ...     ns_steps=1, linear=1.5, cubic=-0.5, quintic=0.0, rms_rate=None))
      >>> g = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> print(jnp.diag(tx.update(g, tx.init(g))[0]["w"]).round(6))
      [0.792 0.944]

    References:
      K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
      https://kellerjordan.github.io/posts/muon/; J. Liu et al., "Muon is Scalable for LLM
      Training", 2025, https://arxiv.org/abs/2502.16982, section 2.2, for `rms_rate`. Matches what
      Keras 3 `Muon` does with a matrix. `optax.contrib.muon` divides a by its weight, and scales X
      differently.
    """

    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    linear: Finite = 3.4445
    cubic: Finite = -4.775
    quintic: Finite = 2.0315
    rms_rate: NotNegative | None = 0.2
    means = ("sum",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ns_steps", check_integer("ns_steps", self.ns_steps, COUNT))

    def slots(self, param: jax.Array) -> dict[str, jax.Array]:
        """Return the sum.

        Raises:
          ValueError: the parameter is not a matrix.
        """
        if param.ndim != 2:
            raise ValueError(
                "`ScaleByMuon` must be for matrices alone: give the other parameters another rule "
                f"with `ForParameters`. Received: a parameter of shape {param.shape}."
            )
        return {"sum": zeros(param)}

    def remember(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> Slots:
        """Add one update to the sum."""
        return {"sum": k["momentum"] * slots["sum"] + update}

    def direction(self, update: jax.Array, slots: Slots, param: jax.Array, k: Numbers) -> jax.Array:
        """Make the sum, or one step ahead of it, orthogonal."""
        u = update + k["momentum"] * slots["sum"] if self.nesterov else slots["sum"]
        coefficients = k["linear"], k["cubic"], k["quintic"]
        x = _sharded_alike(functools.partial(orthogonal, self.ns_steps), u, coefficients)
        if "rms_rate" in k:
            x = k["rms_rate"] * math.sqrt(max(param.shape)) * x
        return x


def orthogonal(steps: int, u: jax.Array, coefficients: Sequence[jax.Array]) -> jax.Array:
    """Return the matrix with the singular vectors of `u`, whose singular values are near 1."""
    linear, cubic, quintic = coefficients
    is_tall = u.shape[0] > u.shape[1]
    x = u.mT if is_tall else u
    scale = 1 / unit_of(x)  # the norm itself may be too large for the dtype
    x = x * scale
    x = x / (sqrt(sum_of_squares(x)) + 1e-7 * scale)
    for _ in range(steps):
        a = x @ x.mT.conj()
        x = linear * x + (cubic * a + quintic * (a @ a)) @ x
    return x.mT if is_tall else x


def _sharded_alike(function: Callable[..., Any], x: jax.Array, *rest: Any) -> Any:
    """Return function(x, *rest), sharded as `x` is; where types tell how, XLA finds the way."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return function(x, *rest)
    return jax.sharding.auto_axes(function, out_sharding=sharding)(x, *rest)


def in_stacks(names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """Return for each parameter whether its first axis is that of stacked layers.

    It is where a parameter of three axes or more has the same first axis: one beside it, or one
    of a subtree in which all have this first axis, as `jax.lax.scan` over layers needs it.
    """
    firsts: dict[str, set[tuple[int, ...]]] = {}  # the first axes in each subtree
    stacks: dict[str, set[tuple[int, ...]]] = {}  # those of three axes or more
    beside: dict[str, set[tuple[int, ...]]] = {}  # and those that are not in a smaller subtree
    pairs = [(_trees(name), tuple(x.shape)) for name, x in zip(names, leaves, strict=True)]
    for trees, shape in pairs:
        first = {shape[:1]} if len(shape) > 2 else set()
        beside.setdefault(trees[0], set()).update(first)
        for tree in trees:
            firsts.setdefault(tree, set()).add(shape[:1])
            stacks.setdefault(tree, set()).update(first)
    return [
        shape[:1] in beside[trees[0]]
        or any(firsts[tree] == {shape[:1]} <= stacks[tree] for tree in trees)
        for trees, shape in pairs
    ]


def _trees(name: str) -> list[str]:
    """Return the subtrees that a parameter is in, the smallest first; "" is all."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:i]) for i in range(len(parts), -1, -1)]
