"""A photograph as data: positions and colours."""

import dataclasses

import numpy as np

PIXELS = 30_000  # a photograph is made smaller until it has no more


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph as pairs of a position and a colour.

    Attributes:
      positions: of shape (pixels, 2): x and y of the pixels' centres, in units of the longer side.
      colours: of shape (pixels, 3): red, green and blue, in [0, 1].
      height: in pixels.
      width: in pixels.
    """

    positions: np.ndarray
    colours: np.ndarray
    height: int
    width: int

    def image(self, colours: np.ndarray) -> np.ndarray:
        """Return the colours of all pixels as an image of shape (height, width, 3)."""
        return colours.reshape(self.height, self.width, 3)

    def psnr(self, colours: np.ndarray) -> float:
        """Return the peak signal-to-noise ratio of a painting, in dB."""
        return decibels(float(np.mean((colours - self.colours) ** 2)))


def decibels(mean_square: float) -> float:
    """Return the PSNR for a mean squared error of values in [0, 1]; at most 100 dB."""
    return -10 * float(np.log10(np.maximum(mean_square, 1e-10)))


def read_photo(path: str | None) -> Photo:
    """Read a photograph and make it smaller.

    Args:
      path: of an image that pillow can read; None for matplotlib's sample photograph.

    Raises:
      ValueError: the file does not exist, or is not a complete image.
    """
    from PIL import Image, ImageOps

    if path is None:
        from matplotlib.cbook import get_sample_data

        path = str(get_sample_data("grace_hopper.jpg", asfileobj=False))
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"There is no image {path!r}.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {path!r} cannot be read: {error}") from error
    scale = min(1.0, (PIXELS / (image.width * image.height)) ** 0.5)
    width, height = (max(1, int(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    y, x = np.mgrid[:height, :width]
    positions = (np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) / max(width, height)
    return Photo(positions.astype(np.float32), pixels.reshape(-1, 3) / 255, height, width)
