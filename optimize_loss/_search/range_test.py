"""A range test before and after its program: its options, its batches, and its suggestion."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimize_loss._checks import (
    DECAY,
    POSITIVE,
    InvalidType,
    Rule,
    check_integer,
    check_number,
    received,
)
from optimize_loss._engine.numbers import has_rate
from optimize_loss._engine.transfers import asked_for
from optimize_loss._state.batches import Call, Source, check_batches
from optimize_loss._state.train_state import TrainState
from optimize_loss.schedules import Decayed
from optimize_loss.transforms import Chain, ReduceOnPlateau

AT_LEAST_3 = Rule("an integer of at least 3", lambda x: x >= 3, kind="count")
ABOVE_1 = Rule("above 1", lambda x: x > 1)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The options of a range test, which `TrainStep.find_learning_rate` explains.

    Raises:
      InvalidType: one is of the wrong kind.
      ValueError: one is out of range.
    """

    lowest: float
    highest: float
    steps: int
    smoothing: float
    divergence: float
    number: str

    def __post_init__(self) -> None:
        _check_bounds(self.lowest, self.highest)
        if not isinstance(self.number, str):
            raise InvalidType(f"`number` must be a name. {received('number', self.number)}")
        check_integer("steps", self.steps, AT_LEAST_3)
        check_number("smoothing", self.smoothing, DECAY)
        check_number("divergence", self.divergence, ABOVE_1)

    @property
    def rates(self) -> np.ndarray:
        """The rate of each step, equally spaced in the logarithm."""
        return np.geomspace(float(self.lowest), float(self.highest), int(self.steps))


def _check_bounds(lowest: Any, highest: Any) -> None:
    """Raise unless these are rates, in this order, which float32 can hold."""
    lowest = check_number("lowest", lowest, POSITIVE)
    highest = check_number("highest", highest, POSITIVE)
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if lowest < least:  # it would be 0
        raise ValueError(
            f"`lowest` must be at least {least:.2g}, since rates are float32. "
            f"{received('lowest', lowest)}"
        )
    if highest > most:
        raise ValueError(
            f"`highest` must be at most {most:.2g}, since rates are float32. "
            f"{received('highest', highest)}"
        )
    if highest <= lowest:
        raise ValueError(
            f"`highest` must be above `lowest`, {lowest}. {received('highest', highest)}"
        )


def check_rate(state: TrainState, ramp: Ramp) -> None:
    """Raise unless the rate is a number of the state, and all that decides on the rate."""
    chain = state.chain
    owner, name = _owner(chain, ramp.number)
    for rate in (ramp.lowest, ramp.highest):
        state.set(**{ramp.number: rate})
    if isinstance(chain.link(owner).numbers()[name], Decayed):
        raise ValueError(
            "`find_learning_rate` must be called on a step without `learning_rate_decay_fn`, which "
            "would change each rate that is tried: build one without it for the test."
        )
    lowered = [n for n, _ in chain.links if isinstance(chain.link(n), ReduceOnPlateau)]
    if lowered and name == "learning_rate" and has_rate(chain.link(owner)):
        raise ValueError(
            f"`find_learning_rate` must be called on a step without {lowered[0]!r}, which would "
            "change the rates that are tried: build one without it for the test."
        )


def _owner(chain: Chain, number: str) -> tuple[str, str]:
    """Return the link and the name of a number."""
    try:
        return chain.meant(number)[0]
    except ValueError as error:
        raise ValueError(
            f"`number` must be one of the state, to which `state.set({number}=...)` gives a value. "
            "An optax transformation has its rate built in: put it in a chain with a "
            f"`rate=ScaleByLearningRate(...)` of its own. {error}"
        ) from error


def gathered(batches: Any, most: int) -> tuple[int, tuple[Any, ...]]:
    """Return how many batches there are, and at most so many of them, stacked.

    Raises:
      InvalidType: `batches` is no iterable of batches.
      ValueError: it is empty, or the batches cannot be stacked.
    """
    check_batches(batches)
    source = Source(batches, None)
    call = source.gather(most)
    source.raise_error()
    if call is None:
        raise ValueError("`batches` must hold a batch: it is empty, or an iterator at its end.")
    if call.steps < most and (other := source.gather(1)) is not None:
        raise _not_alike(call, other)
    source.raise_error()
    if call.steps == 1:
        with asked_for():
            return 1, jax.tree.map(lambda x: jnp.asarray(x)[None], call.parts)
    return call.steps, call.parts


def _not_alike(call: Call, other: Call) -> ValueError:
    """Return the error for batches that differ from the next one."""
    first = call.parts if call.steps == 1 else jax.tree.map(lambda x: x[0], call.parts)
    if not jax.tree.leaves((first, other.parts)):
        return ValueError(
            "`batches` must hold arrays where there are several. For a loss that takes no batch, "
            "write [()], which comes again at each step. Received: batches without arrays."
        )
    if _is_smaller(first, other.parts):
        return ValueError(
            f"`batches` must have one shape: the first {call.steps} do, the next is smaller. Drop "
            "a smaller one at the end, or ask for fewer `steps`. "
            f"Received: {_told(first)}, then {_told(other.parts)}."
        )
    return ValueError(
        "`batches` must be alike in structure, shapes, dtypes and devices. A single batch is "
        "written [batch], as in [(x, y)]: (x, y) by itself is two batches. "
        f"Received: {_told(first)}, then {_told(other.parts)}."
    )


def _is_smaller(first: Any, other: Any) -> bool:
    """Return whether trees of arrays differ only in that the first axes of `other` are shorter."""
    if jax.tree.structure(first) != jax.tree.structure(other):
        return False
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
    shapes = [(np.shape(a), np.shape(b)) for a, b in pairs if np.shape(a) != np.shape(b)]
    of_one_dtype = all(jnp.result_type(a) == jnp.result_type(b) for a, b in pairs)
    return of_one_dtype and all(
        len(a) == len(b) > 0 and a[1:] == b[1:] and a[0] > b[0] for a, b in shapes
    )


def _told(parts: Any) -> str:
    """Return the dtypes and shapes of a batch for a message; of one part without its tuple."""

    def of(leaf: Any) -> str:
        return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}"

    shown = jax.tree.map(of, parts)
    text = repr(shown[0] if len(shown) == 1 else shown).replace("'", "")
    return text if len(text) <= 200 else f"{text[:197]}..."


def steepest(rates: np.ndarray, smoothed: np.ndarray, smoothing: float) -> tuple[Any, bool]:
    """Return the rate at which the curve falls most steeply before its minimum, or None.

    The running mean is one of some n = 1 / (1 - smoothing) losses. Slopes are taken over as many
    steps, n / 2 to each side, so that the noise of single batches does not decide. The first n
    steps, in which the mean has few losses yet, are skipped. n is at most a quarter of all steps.

    The second result is whether the curve has no n / 2 steps behind that rate any more.
    """
    curve, logs = smoothed.astype(np.float64), np.log(rates)
    width = min(round(1 / (1 - smoothing)), len(rates) // 4)
    last, half = int(np.nanargmin(curve)), max(1, width // 2)
    if last - width < 1:
        return None, False
    at = np.arange(width, last + 1)
    low, high = np.maximum(at - half, 0), np.minimum(at + half, last)
    slopes = (curve[high] - curve[low]) / (logs[high] - logs[low])
    best = int(slopes.argmin())
    if slopes[best] >= 0:
        return None, False
    return float(rates[at[best]]), bool(at[best] + half >= len(rates))
