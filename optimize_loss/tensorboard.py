"""Write the metrics of a training step to a TensorBoard log.

    from optimize_loss.tensorboard import TensorBoardWriter

It needs tensorboardX: `pip install 'optimize_loss[tensorboard]'`.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimize_loss._checks import POSITIVE, STEP, InvalidType, check_integer, check_number, received

_COUNTER = itertools.count()


class TensorBoardWriter:
    """Write metrics, as a training step returns them, to one TensorBoard log.

    A scalar becomes a point of a curve, a pair (counts, edges) a histogram. Metrics of
    `step.many`, stacked along a first axis of length k, become k points at the last k steps.
    Scalars are kept as float32. Of a histogram, TensorBoard also wants the sum and the sum of
    squares of the entries; both are taken as if every entry lay at the centre of its bin.
    TensorBoard's tags have letters, digits and `_ . - /`; any other character becomes `_`.

    Where several processes train together, only the first one writes. Each writer has a file of
    its own, so that a run that goes on from a checkpoint may write to the same folder.

    Args:
      folder: where the log goes; made if it does not exist. TensorBoard shows each folder as one
        run.
      flush_secs: seconds after which what was written is on disk; above 0.

    Raises:
      ImportError: tensorboardX is not installed.
      InvalidType: `folder` is no path, or `flush_secs` no number.
      OSError: the folder cannot be made, or not be written to.
      ValueError: `flush_secs` is not above 0.

    Example:
      >>> import os, tempfile
      >>> folder = tempfile.mkdtemp()
      >>> with TensorBoardWriter(folder) as writer:
      ...     writer.write(1, {"loss": 0.5})
      >>> len(os.listdir(folder))
      1
    """

    def __init__(self, folder: str | os.PathLike[str], flush_secs: float = 10.0):
        if not isinstance(folder, str | os.PathLike):
            raise InvalidType(f"`folder` must be a path. {received('folder', folder)}")
        flush_secs = check_number("flush_secs", flush_secs, POSITIVE)
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError(
                "TensorBoardWriter needs tensorboardX. Install it with: "
                f"pip install tensorboardX. ({error})"
            ) from error
        self._closed = False
        self._writer: Any = None
        if jax.process_index() == 0:
            # tensorboardX names files by the second, and writes over one of the same name
            suffix = f".{os.getpid()}.{next(_COUNTER)}"
            make: Any = tensorboardX.SummaryWriter  # annotated as if seconds were whole
            self._writer = make(
                os.fspath(folder), max_queue=100, flush_secs=flush_secs, filename_suffix=suffix
            )

    def write(self, step: Any, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one step, or of k steps in a row.

        Args:
          step: the step of the metrics, an integer of at least 0; after a training step, that is
            `state.step`. For stacked metrics it is the last step: they are those of the steps
            from step - k + 1 to step.
          metrics: {tag: value}. Each value is a real scalar, or a pair (counts, edges) of shapes
            (bins,) and (bins + 1,); or each has, before that, one axis of length k.

        Raises:
          InvalidType: a value is none of these, or is stacked where the first one is not; then
            nothing is written. Or `step` is no integer.
          ValueError: `step` is negative, or too small for k steps; or the writer is closed.
        """
        if self._closed:
            raise ValueError("This TensorBoardWriter is closed.")
        step = check_integer("step", step, STEP)
        metrics = {tag: _read(tag, value) for tag, value in metrics.items()}
        stack = _stack(metrics)
        first = step - (stack[0] if stack else 1) + 1
        if first < 0:
            raise ValueError(
                "`step` must be the last step of stacked metrics, counted from 0. "
                f"Received: step={step} for metrics of {stack[0]} steps."
            )
        if self._writer is None:
            return
        for tag, value in metrics.items():
            for n, one in enumerate(_each(value) if stack else [value], start=first):
                self._write_one(tag, one, n)

    def close(self) -> None:
        """Bring all to disk and close the log; a second call does nothing."""
        self._closed = True
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _write_one(self, tag: str, value: Any, step: int) -> None:
        if not isinstance(value, tuple):
            self._writer.add_scalar(tag, value, step)
            return
        counts, edges = value
        centres = (edges[:-1] + edges[1:]) / 2
        self._writer.add_histogram_raw(
            tag,
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=counts @ centres,
            sum_squares=counts @ centres**2,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def _read(tag: Any, value: Any) -> Any:
    """Return a value as a float64 array, and a histogram as a pair of them."""
    if not isinstance(tag, str):
        raise InvalidType(f"A tag of `metrics` must be text. {received('tag', tag)}")
    if not isinstance(value, tuple):
        return _numbers(tag, value)
    if len(value) == 2:
        counts, edges = (_numbers(tag, part) for part in value)
        if counts.ndim and (*counts.shape[:-1], counts.shape[-1] + 1) == edges.shape:
            return counts, edges
        value = (counts.shape, edges.shape)
    raise InvalidType(
        f"`metrics` must have a scalar or a histogram (counts, edges), of shapes (bins,) and "
        f"(bins + 1,), under each tag. Received, under {tag!r}: a tuple of {value!r:.200}."
    )


def _numbers(tag: str, value: Any) -> np.ndarray:
    if isinstance(value, Tracer):
        raise InvalidType(
            f"`metrics` must be known when they are written: write outside jit, what a step has "
            f"returned. Received, under {tag!r}: {value!r:.200}."
        )
    if not _is_real(value):
        raise InvalidType(
            "`metrics` must have a real scalar or a histogram (counts, edges) under each tag. "
            f"Received, under {tag!r}: {value!r:.200} of type {type(value).__name__}."
        )
    return np.asarray(jax.device_get(value), np.float64)


def _is_real(value: Any) -> bool:
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        return isinstance(value, bool | int | float)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)


def _stack(metrics: dict[str, Any]) -> tuple[int, ...]:
    """Return (k,) for metrics of k steps and () for those of one."""
    stacks = {}
    for tag, value in metrics.items():
        stack = value[0].shape[:-1] if isinstance(value, tuple) else value.shape
        stacks[tag] = stack
        first, expected = next(iter(stacks.items()))
        if len(stack) > 1 or stack != expected:
            raise InvalidType(
                "`metrics` must have scalars and histograms, or all of them with one first axis "
                f"of one length. Received, under {tag!r}: the axes {stack}"
                + (f", but {expected} under {first!r}." if tag != first else ".")
            )
    return next(iter(stacks.values()), ())


def _each(value: Any) -> Iterator[Any]:
    return zip(*value, strict=True) if isinstance(value, tuple) else iter(value)
