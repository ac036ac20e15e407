"""Epochs over a data set, with a position that can be saved."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from optimize_loss._checks import AT_LEAST_1, InvalidType, check_integer, received


class Epochs:
    """The batches of a data set, epoch after epoch: an iterator whose position can be saved.

    Args:
      batches: a function of the epoch number, from 0, that returns its batches, for example
        shuffled with the epoch as seed; or an iterable that can be iterated again.
      count: the number of epochs, at least 1; None to repeat forever.

    Attributes:
      epoch: the epoch of the last batch, from 0.
      batch: how many batches of that epoch have been read.

    Raises:
      InvalidType: `batches` is neither of these, or is an iterator.
      ValueError: `count` is below 1.

    Example:
      >>> import optimize_loss as ol
      >>> data = ol.Epochs(lambda epoch: [10 * epoch + i for i in range(3)], count=2)
      >>> next(data), next(data), data.get_state()
      (0, 1, {'epoch': 0, 'batch': 2})
      >>> list(data), data.epoch
      ([2, 10, 11, 12], 1)
      >>> data.set_state({"epoch": 1, "batch": 1})
      >>> list(data)
      [11, 12]
    """

    def __init__(
        self, batches: Callable[[int], Iterable[Any]] | Iterable[Any], count: int | None = None
    ):
        is_iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        if isinstance(batches, Iterator) or not (callable(batches) or is_iterable):
            raise InvalidType(
                "`batches` must be iterable again and again, or a function of the epoch that "
                f"returns an iterable. {received('batches', batches)}"
            )
        self.count = None if count is None else check_integer("count", count, AT_LEAST_1)
        self.epoch = self.batch = 0
        self._batches = batches
        self._inside: Iterator[Any] | None = None

    def __iter__(self) -> "Epochs":
        return self

    def __next__(self) -> Any:
        if self._inside is None:
            self._inside = self._begin(self.epoch)
        for item in self._inside:
            self.batch += 1
            return item
        if self.batch == 0 or self.epoch + 1 == self.count:
            raise StopIteration
        self.epoch, self.batch, self._inside = self.epoch + 1, 0, None
        return next(self)

    def _begin(self, epoch: int) -> Iterator[Any]:
        batches: Any = self._batches
        found: Any = batches(epoch) if callable(batches) else batches
        return iter(found)

    def get_state(self) -> dict[str, int]:
        """Return the position, for a checkpoint."""
        return {"epoch": self.epoch, "batch": self.batch}

    def set_state(self, state: dict[str, int]) -> None:
        """Go to a position: earlier batches of its epoch are read and dropped.

        Args:
          state: what `get_state` returned.
        """
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._inside = self._begin(self.epoch)
        for _ in range(self.batch):
            next(self._inside)
