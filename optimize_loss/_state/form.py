"""What must agree between a step and the states that it takes."""

from typing import Any, NamedTuple

from optimize_loss._engine.chain import Chain
from optimize_loss._engine.equal import same
from optimize_loss._state.train_state import TrainState

_ADVICE = (
    " Functions are equal where they have the same code, closure and defaults. To go on with a "
    "state whose links do the same: `dataclasses.replace(state, chain=step.chain)`."
)


class Form(NamedTuple):
    """What must agree between a step and a state.

    Every call compares two of them. It costs little: a tuple looks first whether its parts are
    the same objects.

    Attributes:
      increment_step: whether updates advance the global step.
      missing: what the loss takes and the state does not have; nothing, for a step.
      spread: whether slots are spread over a mesh axis.
      chain: the links.
    """

    increment_step: bool
    missing: tuple[str, ...]
    spread: bool
    chain: Chain

    @classmethod
    def of(cls, state: TrainState, needed: tuple[str, ...]) -> "Form":
        """Return that of a state, for a step whose loss takes these attributes of it."""
        missing = needed and tuple(n for n in needed if getattr(state, n) is None)
        return cls(state.increment_step, missing, state.placement is not None, state.chain)

    def difference(self, other: "Form") -> str:
        """Return how the form of a state differs from this one, that of a step."""
        if self.increment_step != other.increment_step:
            return (
                "`state` must come from a step with this `increment_global_step`, "
                f"{self.increment_step}. Received: {other.increment_step}."
            )
        if other.missing:
            return f"`state` must have a `{other.missing[0]}`, which the loss takes."
        if self.spread != other.spread:
            return (
                "`state` must come from a step with this `shard_state`. Received: one whose slots "
                f"are {'' if other.spread else 'not '}spread over a mesh axis."
            )
        return _difference_of_chains(self.chain, other.chain)


def _difference_of_chains(mine: Chain, other: Chain) -> str:
    ours, theirs = dict(mine.links), dict(other.links)
    differ = [n for n in {**ours, **theirs} if not same(ours.get(n), theirs.get(n))]
    as_here = other.precision == mine.precision
    what: Any = differ or ("their order" if as_here else f"precision {other.precision}")
    came, wanted = ({n: links.get(n) for n in differ} for links in (theirs, ours))
    alike = differ and [*map(type, came.values())] == [*map(type, wanted.values())]
    return (
        "`state` must come from the `init` of this step, or of one with equal options. Links that "
        f"differ: {what}. Received: {came}, for a step with {wanted}.{_ADVICE if alike else ''}"
    )
