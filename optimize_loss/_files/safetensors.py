"""Arrays by name in one file of the safetensors layout, with a checksum of each and of the header.

    8 bytes      the length of the header, little-endian
    the header   JSON: {name: {"dtype", "shape", "data_offsets"}, "__metadata__": {text: text}}
    the arrays   one after the other, without gaps

Dtypes that the layout does not have are stored as others: complex numbers as pairs along a last
axis, those of one byte as bytes. The metadata says which. Nothing in a file is ever executed.
"""

import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from optimize_loss._checks import CheckpointCorrupt, CheckpointVersion, InvalidType
from optimize_loss._files.atomic import write_whole

FORMAT = 1
LONGEST_HEADER = 100_000_000  # in bytes, as the safetensors library has it

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES = {code: name for name, code in _CODES.items()}
_STORED_AS = {"complex64": "float32", "complex128": "float64"}
_STORED_AS |= dict.fromkeys(("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"), "uint8")
_STORED_AS |= dict.fromkeys(("float4_e2m1fn", "int4", "uint4", "int2", "uint2"), "uint8")
_DIGEST = re.compile(rb'"header_sha256":"([0-9a-f]{64})"')
_BLANK = b"0" * 64
_OTHER_KINDS = {
    b"\x80": "a pickle, which is not opened, as it could run any code",
    b"PK\x03\x04": "a zip archive, such as .npz or what torch writes, which may hold pickles",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed by gzip",
    b"\x93NUMPY": "a .npy file",
}


class Entry(NamedTuple):
    """Where an array lies in a file, and what it is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int
    sha256: str


def write(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write arrays by name, so that `path` is the complete old file or the complete new one.

    Args:
      path: of the file; its folder must exist.
      arrays: by name; in numpy's dtypes and those of `ml_dtypes`.
      metadata: texts by name, for the reader; "format_version", "sha256", "dtypes" and
        "header_sha256" are taken.

    Raises:
      InvalidType: an array holds no numbers.
      OSError: it cannot be written.
      ValueError: there are so many arrays that the header would be too long; or `path` is a
        symbolic link or a device.
    """
    for name, array in arrays.items():
        if array.dtype.name not in {*_CODES, *_STORED_AS}:
            raise InvalidType(f"{name!r} must be an array of numbers. Received: {array.dtype}.")
    # The widest first, so that each begins at a multiple of its size.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header = _header({name: arrays[name] for name in names}, metadata)
    if len(header) > LONGEST_HEADER:
        raise ValueError(f"There are too many arrays for one file: {len(arrays)}.")
    payload = (_bytes(arrays[name]) for name in names)
    write_whole(path, itertools.chain([len(header).to_bytes(8, "little"), header], payload))


def _header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    told = {name: x.dtype.name for name, x in arrays.items() if x.dtype.name in _STORED_AS}
    digests = {name: hashlib.sha256(_bytes(x)).hexdigest() for name, x in arrays.items()}
    texts = {
        **metadata,
        "format_version": str(FORMAT),
        "dtypes": json.dumps(told),
        "sha256": json.dumps(digests),
        "header_sha256": _BLANK.decode(),
    }
    entries: dict[str, Any] = {"__metadata__": texts}
    begin = 0
    for name, array in arrays.items():
        stored = _STORED_AS.get(array.dtype.name, array.dtype.name)
        shape = array.shape + ((2,) if array.dtype.kind == "c" else ())
        offsets = [begin, begin + array.nbytes]
        entries[name] = {"dtype": _CODES[stored], "shape": shape, "data_offsets": offsets}
        begin += array.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = _header_digest(text).encode()
    return text.replace(b'"header_sha256":"' + _BLANK, b'"header_sha256":"' + digest)


def _header_digest(blank: bytes) -> str:
    """Return the checksum of a header in which its own place is filled with zeros."""
    return hashlib.sha256(len(blank).to_bytes(8, "little") + blank).hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


class Reader:
    """A file that is open for reading, its header checked before anything else is read.

    Args:
      path: of the file.

    Attributes:
      entries: of the arrays by name, in the order of the file.
      metadata: the texts that were given when it was written.

    Raises:
      CheckpointCorrupt: the file is damaged, cut short, or not of this format.
      CheckpointVersion: it is of a newer one.
      OSError: there is no such file, or no right to read it.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise self._corrupt("it is not a regular file")
        self._file = path.open("rb")
        try:
            self.metadata, self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every array with its name, one at a time, once its checksum is found right.

        Raises:
          CheckpointCorrupt: a checksum is wrong.
        """
        for name, entry in self.entries.items():
            data = np.empty(entry.end - entry.begin, np.uint8)
            got = self._file.readinto(data.data)
            if got != data.size or hashlib.sha256(data.data).hexdigest() != entry.sha256:
                raise self._corrupt(f"{name!r} is not what was written")
            yield name, data.view(entry.dtype).reshape(entry.shape)

    def texts(self, key: str) -> dict[str, str]:
        """Return texts by name that were written as one.

        Raises:
          CheckpointCorrupt: there are none of this key.
        """
        try:
            found = json.loads(self.metadata[key])
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise self._corrupt(f"its metadata has no {key!r}") from error
        if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
            raise self._corrupt(f"its {key!r} are no texts by name")
        return found

    def _corrupt(self, why: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(
            f"The file must be intact and written by `optimize_loss.save`, but {why}. "
            f"Received: path={str(self.path)!r}."
        )

    def _read_header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        size = os.fstat(self._file.fileno()).st_size
        first = self._file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
            kinds = [kind for magic, kind in _OTHER_KINDS.items() if first.startswith(magic)]
            other = f"it looks like {kinds[0]}" if kinds else f"it has {size} bytes"
            raise self._corrupt(f"its first bytes are not the length of a header: {other}")
        raw = self._file.read(length)
        self._check_digest(raw)
        try:
            metadata, found = self._parsed(raw)
        except CheckpointVersion:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._corrupt(f"its header is wrong: {error!r:.200}") from error
        self._check_offsets(found, size - 8 - length)
        return metadata, found

    def _parsed(self, raw: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
        """Return what a header says, the arrays in the order of their places."""
        header = json.loads(raw, object_pairs_hook=_distinct)
        metadata = header.pop("__metadata__")
        version = int(metadata["format_version"])
        if version > FORMAT:
            raise CheckpointVersion(
                f"The file must be of format {FORMAT} or older: a newer optimize_loss wrote "
                f"it. Received: format {version}, path={str(self.path)!r}."
            )
        if version < 1:
            raise ValueError(f"there is no format {version}")
        digests, dtypes = (json.loads(metadata[key]) for key in ("sha256", "dtypes"))
        found = {name: _entry(name, header[name], dtypes, digests) for name in header}
        return metadata, dict(sorted(found.items(), key=lambda x: (x[1].begin, x[1].end)))

    def _check_offsets(self, entries: Mapping[str, Entry], size: int) -> None:
        """Raise unless the arrays lie one after the other and fill the file."""
        end = 0
        for name, entry in entries.items():
            if entry.begin != end:
                raise self._corrupt(f"{name!r} begins at byte {entry.begin} and not at {end}")
            end = entry.end
        if end != size:
            raise self._corrupt(f"its arrays have {size} bytes and not {end}")

    def _check_digest(self, raw: bytes) -> None:
        found = _DIGEST.findall(raw)
        if len(found) != 1:
            raise self._corrupt("its header has no checksum, as that of other programs has none")
        if (
            _header_digest(_DIGEST.sub(b'"header_sha256":"' + _BLANK + b'"', raw))
            != found[0].decode()
        ):
            raise self._corrupt("its header is not what was written")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name appears twice")
    return found


def _entry(
    name: str, raw: dict[str, Any], dtypes: Mapping[str, str], digests: Mapping[str, str]
) -> Entry:
    """Return what the header says of an array, if it can be.

    Raises:
      KeyError, TypeError, ValueError: it cannot be.
    """
    stored = _NAMES[raw["dtype"]]
    told = dtypes.get(name, stored)
    if _STORED_AS.get(told, told) != stored:
        raise ValueError(f"{name!r} has two dtypes")
    pairs = (2,) if np.dtype(told).kind == "c" else ()
    shape, (begin, end) = tuple(raw["shape"]), raw["data_offsets"]
    axes = len(shape) - len(pairs)
    if axes > 64:  # numpy's most
        raise ValueError(f"{name!r} has {len(shape)} axes")
    _check_extent(name, shape, np.dtype(stored).itemsize, begin, end)
    if shape[axes:] != pairs:
        raise ValueError(f"{name!r} has no pairs")
    return Entry(np.dtype(told), shape[:axes], begin, end, digests[name])


def _check_extent(name: str, shape: tuple[Any, ...], size: int, begin: Any, end: Any) -> None:
    """Raise unless an array of this shape, of entries of this size, fills these bytes."""
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name!r} has a shape or offsets that cannot be")
    fits = math.prod(shape) * size == end - begin
    if not fits or math.prod(n or 1 for n in shape) * size >= 2**63:
        raise ValueError(f"{name!r} has a shape that does not fit its offsets")
