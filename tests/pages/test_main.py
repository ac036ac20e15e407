"""The main job: its command line, its errors, its files, and what it is made of."""

import os
import re
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import optimize_loss as ol
from optimize_loss import __main__ as command
from optimize_loss._demo import paint
from optimize_loss._demo.paint import WIDTH, Frame, Run, init_net, save_picture, settings
from optimize_loss._demo.photo import PIXELS, Photo, decibels, read_photo


@pytest.fixture(name="image")
def tiny_image(tmp_path):
    """The path of an image of 8 by 6 pixels."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "tiny.png")
    return str(tmp_path / "tiny.png")


def lines(text: str) -> list[str]:
    return text.splitlines()


# --- whole runs


def test_a_run_leaves_a_picture_and_a_log(tmp_path, image, capsys):
    out = tmp_path / "new" / "out"
    arguments = [image, "--steps", "20", "--seed", "3", "--out", str(out), "--tensorboard"]
    assert command.main(arguments) == 0

    printed, progress = capsys.readouterr()
    assert lines(printed)[-1] == str(out / "painting.png")
    assert re.search(r"Adam, rate 0.01, cosine decay, clip 0.01 +\d+\.\d dB", printed)
    assert "100 %, loss" in progress
    with Image.open(out / "painting.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width == WIDTH

    folders = [path for path in out.iterdir() if path.is_dir()]
    assert len(folders) == 3  # one for each setting
    (main,) = (path for path in folders if "cosine" in path.name)
    log = EventAccumulator(str(main)).Reload()
    scalars = {"loss", "learning_rate", "global_norm/gradient_norm"}
    assert scalars <= set(log.Tags()["scalars"])
    assert "gradients/layers/0/kernel" in log.Tags()["histograms"]
    assert "gradients/frequencies" not in log.Tags()["histograms"]  # they are not trained
    assert [event.step for event in log.Scalars("loss")] == list(range(1, 21))
    assert log.Scalars("learning_rate")[0].value == np.float32(0.01)
    # the rate ends, after the last step, at 1 % of where it began
    assert 1e-4 < log.Scalars("learning_rate")[-1].value < 2e-4


def test_a_run_without_options_must_reach_its_target(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paint, "STEPS", 2)
    assert command.main(["--out", str(tmp_path)]) == 1
    printed, progress = capsys.readouterr()
    assert re.search(r"The painting has \d+\.\d dB; .* must reach 28 dB", lines(progress)[-1])
    assert lines(printed)[-1] == str(tmp_path / "painting.png")


def test_a_run_that_diverges_stops_and_says_so(tmp_path, image, capsys):
    arguments = [image, "--out", str(tmp_path / "out"), "--optimizer", "SGD", "--clip", "0"]
    assert command.main([*arguments, "--steps", "9", "--learning-rate", "1e38"]) == 1
    printed, progress = capsys.readouterr()
    assert "a lower --learning-rate may help" in lines(progress)[-1]
    assert "diverged" in printed
    assert (tmp_path / "out" / "painting.png").exists()


def test_ctrl_c_leaves_no_traceback_and_whole_files(tmp_path, image):
    # a shell that runs this in the background would have the signal ignored
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('optimize_loss', run_name='__main__', alter_sys=True)"
    )
    arguments = [image, "--steps", "1000000", "--tensorboard", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()  # it trains
        process.send_signal(signal.SIGINT)
        printed, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "0 %, loss" in first
    assert "Traceback" not in rest
    assert lines(rest)[-1] == "python -m optimize_loss: interrupted"
    assert printed == ""
    (log,) = (tmp_path / "out").iterdir()  # neither a picture nor a part of one
    assert len(EventAccumulator(str(log)).Reload().Scalars("loss")) >= 10


def test_ctrl_c_while_it_imports_is_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("raise KeyboardInterrupt")  # as if pressed at this moment
    path = os.pathsep.join([str(tmp_path), os.path.dirname(os.path.dirname(ol.__file__))])
    for module in ("optimize_loss", "optimize_loss._demo.paint"):
        done = subprocess.run(
            [sys.executable, "-m", module],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode in (130, -signal.SIGINT)
        is_command = module == "optimize_loss"
        assert (done.stderr == "python -m optimize_loss: interrupted\n") == is_command
        assert ("Traceback" in done.stderr) != is_command


# --- what is refused

REFUSED = {
    "clip-too-small": (["--clip", "1e-60"], "`--clip` must be a float32"),
    "noise-too-large": (["--noise", "1e39"], "`--noise` must be a float32"),
    "no-steps": (["--steps", "0"], "`--steps` must be an integer of at least 1"),
    "steps-no-number": (["--steps", "many"], "--steps: invalid int value: 'many'"),
    "negative-rate": (["--learning-rate", "-1"], "`--learning-rate` must be above 0"),
    "nan-rate": (["--learning-rate", "nan"], "`--learning-rate` must be above 0 and finite"),
    "negative-clip": (["--clip", "-1"], "`--clip` must be at least 0"),
    "infinite-noise": (["--noise", "inf"], "`--noise` must be at least 0 and finite"),
    "negative-seed": (["--seed", "-1"], "`--seed` must be an integer in"),
    "unknown-optimizer": (["--optimizer", "Adm"], "Nearest: 'Adam'"),
    "unknown-flag": (["--speed", "9"], "unrecognized arguments: --speed"),
    "flag-without-value": (["--out"], "--out: expected one argument"),
    "no-image": (["no/such.jpg"], "There is no image 'no/such.jpg'"),
    "image-a-folder": ([os.curdir], "The image '.' cannot be read"),
    "image-a-text": ([__file__], "test_main.py' cannot be read"),
    "out-a-file": (["--out", __file__], "`--out` must be a folder to write to"),
    "out-in-a-file": (["--out", f"{__file__}/out"], "`--out` must be a folder to write to"),
}


def test_a_device_that_is_not_there_is_one_line(tmp_path, image):
    done = subprocess.run(
        [sys.executable, "-m", "optimize_loss", image, "--out", str(tmp_path / "out")],
        env=os.environ | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    last = lines(done.stderr)[-1]
    assert last.startswith("python -m optimize_loss: JAX finds no device: JAX_PLATFORMS must")
    assert "JAX_PLATFORMS=cuda." in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(capsys, arguments: list[str], message: str):
    assert command.main(arguments) == 2
    printed, refusal = capsys.readouterr()
    assert printed == ""
    assert len(lines(refusal)) == 1
    assert refusal.startswith("python -m optimize_loss: ")
    assert message in refusal


def test_a_damaged_image_is_refused(tmp_path, image, capsys):
    whole = (tmp_path / "tiny.png").read_bytes()
    (tmp_path / "part.png").write_bytes(whole[: len(whole) // 2])
    assert command.main([str(tmp_path / "part.png")]) == 2
    assert re.fullmatch(r".*part.png' cannot be read: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("package", ["matplotlib", "PIL", "tqdm", "tensorboardX"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    assert command.main(["--tensorboard", "--out", str(tmp_path / "out")]) == 2
    (refusal,) = lines(capsys.readouterr().err)
    assert package in refusal
    assert "pip install -e '.[demo]'" in refusal
    assert not (tmp_path / "out").exists()


def test_help_and_import_need_no_extra():
    code = (
        "import sys; from optimize_loss.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'matplotlib', 'PIL', 'tqdm', 'tensorboardX'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--learning-rate" in done.stdout


def test_a_picture_that_cannot_be_saved_is_refused(tmp_path, image, monkeypatch, capsys):
    (tmp_path / "painting.png").mkdir()  # where the picture would go
    monkeypatch.setattr(paint, "train", lambda setting, *rest: drawn(setting))
    assert command.main([image, "--out", str(tmp_path)]) == 2
    (refusal,) = lines(capsys.readouterr().err)
    assert "The results cannot be written" in refusal


# --- the parts

PHOTO = Photo(
    positions=np.zeros((48, 2), np.float32),
    colours=np.linspace(0, 1, 144, dtype=np.float32).reshape(48, 3),
    height=6,
    width=8,
)


def drawn(setting: paint.Setting, steps: int = 7) -> Run:
    """A run that nobody trained, for a photograph of the size of `PHOTO`."""
    curve = np.linspace(1.0, 0.1, steps)
    tags = ("loss", "global_norm/gradient_norm", "learning_rate")
    frames = [Frame(step, 10.0, PHOTO.colours) for step in (0, steps)]
    return Run(setting, dict.fromkeys(tags, curve), frames, 1.0)


RUNS = [drawn(setting) for setting in settings(7, "Adam", None, 0.01, 0.0)]


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_a_saved_picture_is_whole(tmp_path, steps: int):
    path = tmp_path / "picture.png"
    save_picture(str(path), PHOTO, [drawn(run.setting, steps) for run in RUNS])
    with Image.open(path) as picture:
        picture.load()
        assert picture.width == WIDTH
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert list(tmp_path.iterdir()) == [path]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError], ids=["ctrl-c", "disk-full"])
def test_a_save_that_fails_keeps_the_picture_before(
    tmp_path, monkeypatch, failure: type[BaseException]
):
    def half(figure: Any, file: Any, **options: Any) -> None:
        file.write(b"half of a picture")
        raise failure

    path = tmp_path / "picture.png"
    path.write_bytes(b"the picture before")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(failure):
        save_picture(str(path), PHOTO, RUNS)
    assert path.read_bytes() == b"the picture before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("mean_square", "expected"), [(1.0, 0.0), (0.01, 20.0), (1e-4, 40.0), (0.0, 100.0)]
)
def test_decibels(mean_square: float, expected: float):
    assert decibels(mean_square) == pytest.approx(expected)


def test_a_photograph_is_pairs_of_position_and_colour(image):
    photo = read_photo(image)
    with Image.open(image) as file:
        expected = np.asarray(file, np.float32) / 255
    assert (photo.height, photo.width) == (6, 8)
    np.testing.assert_array_equal(photo.image(photo.colours), expected)
    assert photo.psnr(photo.colours) == 100.0
    # rows from top to bottom, pixels from left to right, in units of the longer side
    np.testing.assert_allclose(photo.positions[[0, 1, 8]] * 8, [[0.5, 0.5], [1.5, 0.5], [0.5, 1.5]])


@pytest.mark.parametrize("size", [(1000, 100), (1, 1), (1, 90_000)], ids=["wide", "dot", "line"])
def test_a_photograph_is_made_smaller(tmp_path, size: tuple[int, int]):
    Image.new("L", size).save(tmp_path / "image.png")
    photo = read_photo(str(tmp_path / "image.png"))
    assert 1 <= photo.width * photo.height <= max(PIXELS, *size)
    assert photo.positions.shape == (photo.width * photo.height, 2)
    assert photo.colours.shape == (photo.width * photo.height, 3)


def test_a_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    photo = read_photo(str(tmp_path / "turned.jpg"))
    assert (photo.width, photo.height) == (6, 8)


def test_every_setting_starts_from_one_net_and_sees_one_batch():
    first, again, other = init_net(0), init_net(0), init_net(1)
    np.testing.assert_array_equal(first["frequencies"], again["frequencies"])
    assert not np.array_equal(first["frequencies"], other["frequencies"])
    runs = [
        paint.train(setting, PHOTO, 1, 0, None) for setting in settings(1, "SGD", 1e-30, 0.0, 0.0)
    ]
    assert len({run.metrics["loss"][0] for run in runs}) == 1


def test_the_settings_to_compare_with():
    labels = [setting.label for setting in settings(9, "Momentum", 0.5, 0.0, 0.1)]
    assert labels == [
        "Momentum, rate 0.5, cosine decay, noise 0.1",
        "Momentum, rate 0.5, constant",
        "SGD, rate 10, constant",
    ]
    assert settings(9, "SGD", None, 0.0, 0.0)[2].label == "Adam, rate 0.01, constant"


@pytest.mark.parametrize("name", sorted(ol.OPTIMIZER_CLS_NAMES))
def test_every_optimizer_has_a_setting(name: str):
    assert settings(9, name, None, 0.01, 0.0)[0].label.startswith(name)
