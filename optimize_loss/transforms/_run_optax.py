"""An optax transformation for some of the parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimize_loss._engine.arrays import compute_dtype
from optimize_loss._engine.link import Numbers, TreeLink


@dataclasses.dataclass(frozen=True)
class RunOptax(TreeLink):
    """Run an optax transformation over the parameters that a link is for, as a dict by name.

    It sees them in float32 or wider, and zeros for a gradient that is None. Extra arguments, such
    as the loss, do not reach it.

    Args:
      transformation: an object with optax's `init` and `update`.
    """

    transformation: Any

    def init(self, params: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Return the state of the transformation."""
        wide = {name: p.astype(compute_dtype(p.dtype)) for name, p in params.items()}
        return {"state": jax.tree.map(jnp.asarray, self.transformation.init(wide))}

    def run(
        self,
        updates: Mapping[str, jax.Array],
        slots: Mapping[str, Any],
        params: Mapping[str, jax.Array],
        k: Numbers,
    ) -> tuple[Mapping[str, jax.Array], Mapping[str, Any]]:
        """Return what the transformation makes of the updates."""
        given = {name: updates.get(name, jnp.zeros_like(p)) for name, p in params.items()}
        update = optax.with_extra_args_support(self.transformation).update
        new: Any
        new, state = update(given, slots["state"], dict(params))
        return {name: new[name] for name in updates}, {"state": state}
