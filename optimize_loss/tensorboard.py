"""Write the metrics of a training step to a TensorBoard log.

    from optimize_loss.tensorboard import TensorBoardWriter

It needs tensorboardX, which the extra `tensorboard` installs.
"""

import itertools
import os
from collections.abc import Mapping
from typing import Any

import jax

from optimize_loss._checks import POSITIVE, InvalidType, check_number, received
from optimize_loss._report.logger import Logger

_COUNTER = itertools.count()


class TensorBoardWriter(Logger):
    """Write the metrics of a training step to a TensorBoard log.

    It is a hook of `TrainStep.run`, and can be called by hand: `writer.write(state.batches,
    metrics)`. A scalar becomes a point of a curve, a pair (counts, edges) a histogram. Metrics of
    `step.many`, stacked along a first axis of length k, become k points at the last k batches.
    Scalars are kept as float32. Of a histogram, TensorBoard also wants the sum and the sum of
    squares of the entries; both are computed as if every entry were at the center of its bin.
    TensorBoard's tags have letters, digits and `_ . - /`; any other character becomes `_`.

    Where several processes train together, only the first one writes. Each writer has a file of
    its own, so that a run that goes on from a checkpoint may write to the same folder.

    Args:
      folder: where the log goes; made if it does not exist. TensorBoard shows each folder as one
        run.
      flush_secs: seconds after which what was written is on disk; above 0.
      every: as a hook, after how many batches it writes what has come since, at least 1.

    Raises:
      ImportError: tensorboardX is not installed.
      InvalidType: `folder` is not a path, `flush_secs` not a number, or `every` not an integer.
      OSError: the folder cannot be made, or not be written to.
      ValueError: `flush_secs` is not above 0, or `every` below 1.

    Example:
      >>> import os, tempfile
      >>> folder = tempfile.mkdtemp()
      >>> with TensorBoardWriter(folder) as writer:
      ...     writer.write(1, {"loss": 0.5})
      >>> len(os.listdir(folder))
      1
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        flush_secs: float = 10.0,
        every: int | None = 100,
    ):
        super().__init__(every)
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

    def write(self, batch: Any, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one batch, or of k batches in a row, as points at their numbers.

        Args:
          batch: as for `optimize_loss.loggers.Logger.write`: after a step, `state.batches`.
          metrics: as there.

        Raises:
          InvalidType: as there.
          ValueError: as there; or the writer is closed.
        """
        if self._closed:
            raise ValueError("This TensorBoardWriter is closed.")
        super().write(batch, metrics)

    def write_one(self, batch: int, values: dict[str, Any]) -> None:
        """Write one point of each curve.

        Args:
          batch: its number.
          values: by tag.
        """
        for tag, value in values.items():
            self._write_one(tag, value, batch)

    def close(self) -> None:
        """Bring all to disk and close the log; a second call does nothing."""
        self._closed = True
        if self._writer is not None:
            self._writer.close()
            self._writer = None

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
