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

    It sees them in float32 or wider, and zeros for a gradient that is None. It receives no extra
    arguments, except the loss in `RunOptaxWithLoss`.

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
        """Return the updates of the transformation."""
        given = {name: updates.get(name, jnp.zeros_like(p)) for name, p in params.items()}
        update = optax.with_extra_args_support(self.transformation).update
        new: Any
        try:
            new, state = update(given, slots["state"], dict(params), **k)
        except TypeError as error:
            error.add_note(
                "`rules` with an `optimizer` give each optax transformation only some of the "
                "parameters. It is given the loss as `value`, but no `grad` and `value_fn`, as a "
                "line search needs: that must be the optimizer of all parameters. `variables` "
                "names which of them are trained."
            )
            raise
        return {name: new[name] for name in updates}, {"state": state}


@dataclasses.dataclass(frozen=True)
class RunOptaxWithLoss(RunOptax):
    """Run an optax transformation that takes extra arguments: it receives the loss as `value`."""

    needs = "loss"

    def scalars(
        self, numbers: Numbers, memory: Numbers, total: Any, step: jax.Array
    ) -> tuple[Numbers, Numbers]:
        """Return the loss."""
        return {"value": total}, {}


def run_optax(transformation: Any) -> RunOptax:
    """Return the link that runs an optax transformation for some of the parameters."""
    takes_more = isinstance(transformation, optax.GradientTransformationExtraArgs)
    return RunOptaxWithLoss(transformation) if takes_more else RunOptax(transformation)
