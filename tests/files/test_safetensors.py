"""The file of arrays: read back bit by bit, whole or not there, and every damage found."""

import hashlib
import json
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from optimize_loss import CheckpointCorrupt, CheckpointVersion, InvalidType
from optimize_loss._files import atomic as whole_file
from optimize_loss._files import safetensors as layout

ROOT = pathlib.Path(__file__).parent.parent.parent
DTYPES = [*layout._CODES, *layout._STORED_AS]
SHAPES = {
    "matrix": (2, 3),
    "64-axes": (1,) * 62 + (2, 1),
    "scalar": (),
    "empty": (0, 3),
    "vector": (5,),
}


def some_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params/dense/kernel": rng.normal(size=(8, 4)).astype(np.float32),
        "params/dense/bias": rng.normal(size=4).astype("bfloat16"),
        "optimizer/step": np.asarray(7, np.int32),
        "optimizer/adam/m": rng.normal(size=(3, 5)),
        "model_state/none": np.zeros((0, 2), np.float16),
        "model_state/flags": np.array([True, False, True]),
        "model_state/wave": rng.normal(size=3).astype(np.complex64),
    }


def read(path):
    with layout.Reader(pathlib.Path(path)) as file:
        return dict(file.arrays())


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.fixture
def written(path):
    layout.write(path, some_arrays(), {"about": "x"})
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(path, dtype):
    arrays = {n: np.arange(np.prod(s)).reshape(s).astype(dtype) for n, s in SHAPES.items()}
    layout.write(path, arrays, {})
    assert_same(read(path), arrays)


def test_arrays_that_are_not_contiguous_come_back(path):
    x = np.arange(24.0).reshape(4, 6)
    arrays = {"turned": x.T, "thinned": x[::2, ::3], "backwards": x[::-1], "one": x[1:2, 3]}
    layout.write(path, arrays, {})
    assert_same(read(path), arrays)


@pytest.mark.parametrize("name", ["", "a/b", "é ∂", '"header_sha256":"' + "0" * 64 + '"', "a\\"])
def test_any_name_comes_back(path, name):
    layout.write(path, {name: np.ones(2)}, {"text": "é"})
    assert_same(read(path), {name: np.ones(2)})


def test_no_array_at_all(path):
    layout.write(path, {}, {})
    assert read(path) == {}


def test_the_safetensors_library_reads_it(written):
    with safetensors.safe_open(written, framework="np") as file:
        got = {name: file.get_tensor(name) for name in [*file.keys()]}
        assert file.metadata()["about"] == "x"
    wanted = some_arrays()
    wave = wanted.pop("model_state/wave")
    np.testing.assert_array_equal(got.pop("model_state/wave") @ [1, 1j], wave)
    assert_same(got, wanted)


def test_what_holds_no_numbers_is_refused(path):
    for array in (np.array(["a"]), np.array([{}])):
        with pytest.raises(InvalidType, match="'x' must be an array of numbers"):
            layout.write(path, {"x": array}, {})
    assert not path.exists()


def refused(path):
    try:
        read(path)
    except CheckpointCorrupt as error:
        return str(path) in str(error)
    return False


def test_400_flipped_bits_are_found(written):
    data = written.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    bits = [*np.linspace(0, 8 * header - 1, 200).astype(int)]
    bits += [*np.linspace(8 * header, 8 * len(data) - 1, 200).astype(int)]
    found = 0
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        written.write_bytes(flipped)
        found += refused(written)
    assert (len(set(bits)), found) == (400, 400)


def test_a_flipped_bit_in_an_array_names_it(written):
    data = bytearray(written.read_bytes())
    data[-1] ^= 1
    written.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="'model_state/flags' is not what was written"):
        read(written)


def test_100_truncations_are_found(written):
    data = written.read_bytes()
    lengths = np.linspace(0, len(data) - 1, 100).astype(int)
    found = 0
    for length in lengths:
        written.write_bytes(data[:length])
        found += refused(written)
    assert (len(set(lengths)), found) == (100, 100)


def test_bytes_behind_the_end_are_found(written):
    written.write_bytes(written.read_bytes() + b"\0")
    assert refused(written)


def forged(header, payload=b"", signed=True):
    """Return the bytes of a file, with a checksum that is right where `signed`."""
    raw = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    if signed:
        blank = b'"header_sha256":"' + layout._BLANK
        raw = raw.replace(blank, blank[:-64] + layout._header_digest(raw).encode())
    return len(raw).to_bytes(8, "little") + raw + payload


def header_of(*entries, **changed):
    """Return a header with entries of (name, dtype, shape, offsets)."""
    digests = {name: hashlib.sha256(b"\0" * 8).hexdigest() for name, *_ in entries}
    texts = {"format_version": "1", "dtypes": "{}", "sha256": json.dumps(digests)}
    made = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, dtype, shape, offsets in entries
    }
    return {"__metadata__": {**texts, **changed, "header_sha256": "0" * 64}, **made}


GOOD = ("x", "F32", [2], [0, 8])
DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000
SIGN = b',"header_sha256":"' + layout._BLANK + b'"}'
HOSTILE = {
    "length-2**63": (2**63).to_bytes(8, "little") + b"{}",
    "length-2**64-1": b"\xff" * 8 + b"{}",
    "length-90-MB": (90_000_000).to_bytes(8, "little") + b"{}",
    "huge-shape": forged(header_of(("x", "F32", [2**40, 2**40], [0, 2**82])), b"\0" * 8),
    "huge-empty-shape": forged(header_of(("x", "F32", [0, 2**62, 2**62], [0, 0]))),
    "offsets-past-the-end": forged(header_of(("x", "F32", [2**30], [0, 2**32])), b"\0" * 8),
    "many-digits": forged(json.dumps(header_of(GOOD)).replace("[2]", f"[{'9' * 9999}]").encode()),
    "overlapping": forged(header_of(GOOD, ("y", "F32", [2], [4, 12])), b"\0" * 12),
    "same-bytes-twice": forged(header_of(GOOD, ("y", "F32", [2], [0, 8])), b"\0" * 8),
    "gap": forged(header_of(GOOD, ("y", "F32", [2], [12, 20])), b"\0" * 20),
    "turned-offsets": forged(header_of(("x", "F32", [2], [8, 0])), b"\0" * 8),
    "negative-offsets": forged(header_of(("x", "F32", [2], [-8, 0])), b"\0" * 8),
    "negative-shape": forged(header_of(("x", "F32", [-1, -2], [0, 8])), b"\0" * 8),
    "bool-shape": forged(header_of(("x", "F64", [True], [0, 8])), b"\0" * 8),
    "float-shape": forged(header_of(("x", "F32", [2.0], [0, 8])), b"\0" * 8),
    "text-shape": forged(header_of(("x", "F32", "2", [0, 8])), b"\0" * 8),
    "three-offsets": forged(header_of(("x", "F32", [2], [0, 4, 8])), b"\0" * 8),
    "65-dimensions": forged(header_of(("x", "F32", [1] * 64 + [2], [0, 8])), b"\0" * 8),
    "unknown-dtype": forged(header_of(("x", "O8", [1], [0, 8])), b"\0" * 8),
    "two-dtypes": forged(header_of(GOOD, dtypes='{"x":"complex128"}'), b"\0" * 8),
    "object-dtype": forged(header_of(GOOD, dtypes='{"x":"object"}'), b"\0" * 8),
    "no-pairs": forged(header_of(("x", "F32", [], [0, 4]), dtypes='{"x":"complex64"}'), b"\0" * 4),
    "no-checksum-of-an-array": forged(header_of(GOOD, sha256="{}"), b"\0" * 8),
    "checksum-of-another": forged(header_of(GOOD), b"\1" * 8),
    "name-twice": forged(
        json.dumps(header_of(GOOD)).encode()[:-1] + b',"x":' + json.dumps({}).encode() + b"}"
    ),
    "no-metadata": forged({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "other-program": forged({"__metadata__": {"format": "pt"}}, signed=False),
    "unsigned": forged(header_of(GOOD), b"\0" * 8, signed=False),
    "metadata-is-no-mapping": forged(b'{"__metadata__":[]' + SIGN),
    "header-is-a-list": forged(b'[{"a":1' + SIGN + b"]"),
    "not-json": forged(b'{"__metadata__":{' + SIGN[1:]),
    "not-utf-8": forged(b'{"\xff":1' + SIGN),
    "deep": forged(DEEP + SIGN),
    "deep-in-metadata": forged(header_of(GOOD, sha256="[" * 200_000), b"\0" * 8),
    "version-is-no-number": forged(header_of(GOOD, format_version="new"), b"\0" * 8),
    "empty": b"",
    "garbage": bytes(range(256)) * 4,
    "text": b"Dear diary, today nothing happened.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_and_allocates_nothing(path, name):
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        assert refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000 + 60 * len(HOSTILE[name])


def test_a_forged_file_that_is_right_is_read(path):  # so that the rows above fail for their flaw
    path.write_bytes(forged(header_of(GOOD), b"\0" * 8))
    assert_same(read(path), {"x": np.zeros(2, np.float32)})


def test_a_newer_version_is_told_from_damage(path):
    path.write_bytes(forged(header_of(GOOD, format_version="2"), b"\0" * 8))
    with pytest.raises(CheckpointVersion, match=r"format 1 or older.*Received: format 2"):
        read(path)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_pickles_are_refused_and_do_not_run(tmp_path, path):
    canary = tmp_path / "canary"
    objects = np.array([Canary(canary)], dtype=object)
    np.savez(tmp_path / "a.npz", objects)
    np.save(tmp_path / "a.npy", objects)
    files = [(tmp_path / "a.npz").read_bytes(), (tmp_path / "a.npy").read_bytes()]
    files += [pickle.dumps(Canary(canary), protocol) for protocol in range(6)]
    for data in files:
        path.write_bytes(data)
        assert refused(path)
    assert not canary.exists()
    path.write_bytes(pickle.dumps({"w": 1.0}))
    with pytest.raises(CheckpointCorrupt, match="looks like a pickle"):
        read(path)
    pickle.loads(files[-1])
    assert canary.exists()  # it was alive


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointCorrupt, match="not a regular file"):
        read(tmp_path / "pipe")


def strays(folder):
    return [x.name for x in pathlib.Path(folder).iterdir() if ".tmp-" in x.name]


def fill_the_disk(folder):
    """Write below and above a limit on the size of files, in a process of its own."""
    path = pathlib.Path(folder) / "a.safetensors"
    layout.write(path, some_arrays(), {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        layout.write(path, {"x": np.zeros(10**6)}, {})
    except OSError as error:
        print(json.dumps([str(error), strays(folder)]))


def in_a_process(function, folder):
    code = f"from tests.files import test_safetensors as tested; tested.{function}({str(folder)!r})"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    message, left = json.loads(in_a_process("fill_the_disk", tmp_path))
    assert "File too large" in message
    assert "a.safetensors" in message
    assert left == []
    assert_same(read(tmp_path / "a.safetensors"), some_arrays())


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupt_leaves_the_old_file_whole(written, monkeypatch, stage, error):
    def fails(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, stage, fails)
        with pytest.raises(error):
            layout.write(written, {"x": np.zeros(3)}, {})
    assert strays(written.parent) == []
    assert_same(read(written), some_arrays())


def test_a_folder_without_the_right_to_write(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        layout.write(tmp_path / "nowhere" / "a.safetensors", {}, {})
    assert str(missing.value).endswith(f"'{tmp_path}/nowhere/a.safetensors'")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        layout.write(tmp_path / "file" / "a.safetensors", {}, {})


def test_an_error_of_the_last_step_names_the_file_of_the_user(path, monkeypatch):
    def fails(temporary, target):
        raise OSError(5, "Input/output error", str(temporary), None, str(target))

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=r"Input/output error") as error:
        layout.write(path, {}, {})
    assert str(error.value) == f"[Errno 5] Input/output error: '{path}'"


def test_a_symbolic_link_is_not_replaced(tmp_path, written):
    link = tmp_path / "link"
    link.symlink_to(written)
    with pytest.raises(ValueError, match="must not be a symbolic link"):
        layout.write(link, {}, {})
    assert link.is_symlink()
    assert_same(read(link), some_arrays())


@pytest.mark.parametrize("name", ["with spaces.st", "ünï∂.st", "[a]*?.st"])
def test_any_file_name(tmp_path, name):
    for seed in (0, 1):
        layout.write(tmp_path / name, some_arrays(seed), {})
    assert_same(read(tmp_path / name), some_arrays(1))
    assert [x.name for x in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_mask_of_the_user(path, mask, mode):
    before = os.umask(mask)
    try:
        layout.write(path, {}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_strays_are_swept_but_no_file_that_is_being_written(tmp_path, path):
    dead = tmp_path / ".a.safetensors.tmp-dead"
    other = tmp_path / ".b.safetensors.tmp-other"
    alive = tmp_path / ".a.safetensors.tmp-alive"
    dead.touch()
    other.touch()
    with whole_file._created(alive):
        layout.write(path, {}, {})
        assert sorted(strays(tmp_path)) == sorted([alive.name, other.name])
    layout.write(path, {}, {})
    assert strays(tmp_path) == [other.name]


def test_of_two_writers_at_once_the_last_wins(path, monkeypatch):
    replace = os.replace

    def slow(temporary, target):
        monkeypatch.setattr(os, "replace", replace)
        layout.write(path, some_arrays(2), {})  # another one, before this one is done
        assert_same(read(path), some_arrays(2))
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", slow)
    layout.write(path, some_arrays(1), {})
    assert_same(read(path), some_arrays(1))


def test_a_writer_whose_file_another_one_sweeps_makes_a_new_one(path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    fdopen, flock, sweepers = os.fdopen, fcntl.flock, []

    def begins_to_sweep(*args):
        monkeypatch.setattr(os, "fdopen", fdopen)
        (stray,) = path.parent.glob(".a.safetensors.tmp-*")
        sweepers.append((stray, stray.open("rb")))
        flock(sweepers[0][1], fcntl.LOCK_EX)
        return fdopen(*args)

    def sweeps():
        for stray, file in sweepers:
            stray.unlink()
            file.close()
        sweepers.clear()

    def flocks(file, how):
        if not how & fcntl.LOCK_NB:  # which the sweeper makes wait
            sweeps()
        flock(file, how)

    def parts():
        sweeps()
        yield b"new"

    monkeypatch.setattr(os, "fdopen", begins_to_sweep)
    monkeypatch.setattr(fcntl, "flock", flocks)
    whole_file.write_whole(path, parts())
    assert path.read_bytes() == b"new"
    assert strays(path.parent) == []


KILLS = 100
STEPS = 10**6


def numbered(step):
    return {"params/w": np.full(50_000, step, np.float32), "optimizer/step": np.asarray(step)}


def save_until_killed(path, report):
    """Save one step after another; tell of each stage by a byte, and of a saved step by `A`."""
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
    for name, original in originals.items():

        def told(*args, original=original):
            os.write(report, b"b")
            original(*args)
            os.write(report, b"a")

        setattr(os, name, told)
    first = int(read(path)["optimizer/step"]) + 1
    for step in range(first, STEPS):
        layout.write(path, numbered(step), {})
        os.write(report, b"A")


def kill_savers(folder):
    """Kill 100 children while they save, each after some more of what it tells."""
    path = pathlib.Path(folder) / "a.safetensors"
    layout.write(path, numbered(0), {})
    lost, torn, swept, step = 0, 0, 0, 0
    for trial in range(KILLS):
        listen, report = os.pipe()
        child = os.fork()
        if not child:
            save_until_killed(path, report)
        os.close(report)
        told = b"".join(os.read(listen, 1) for _ in range(1 + trial))
        for _ in range(trial * 977):  # further into what comes next
            pass
        os.kill(child, 9)
        os.waitpid(child, 0)
        while more := os.read(listen, 65536):
            told += more
        os.close(listen)
        acknowledged = step + told.count(b"A")
        try:
            step = int(read(path)["optimizer/step"])
        except CheckpointCorrupt:
            torn += 1
        lost += step < acknowledged
        swept += len(strays(folder)) > 0
    layout.write(path, numbered(0), {})
    print(json.dumps([lost, torn, swept > 0, strays(folder), step > KILLS]))


def test_100_kills_lose_no_step_that_was_acknowledged(tmp_path):
    lost, torn, some_were_left, left, went_on = json.loads(in_a_process("kill_savers", tmp_path))
    assert (lost, torn) == (0, 0)
    assert some_were_left  # so that there was something to sweep
    assert left == []
    assert went_on
