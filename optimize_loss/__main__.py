"""Train a small net to paint a photograph, and draw how it went."""

import argparse
import importlib
import math
import os
import sys
import tempfile
from typing import NoReturn

import jax
import numpy as np

import optimize_loss as ol
from optimize_loss._checks import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    check_integer,
    check_number,
    received,
)
from optimize_loss._demo import paint
from optimize_loss._demo.interrupted import INTERRUPTED
from optimize_loss._demo.paint import save_picture
from optimize_loss._demo.photo import read_photo

TARGET = 28.0  # dB, which a run without options reaches


class Refused(Exception):
    """The command cannot be carried out as it was given; the message says why."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: the painting is not finite, or a run without options missed its target. 2: wrong
    arguments, or a file, a package or a device that is not there. 130: interrupted.

    Args:
      argv: the arguments; None for those of the process.
    """
    try:
        return _run(_arguments(argv))
    except Refused as error:
        print("python -m optimize_loss: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_CLIP = "bound on the norm of all gradients, 0 for none"
_NOISE = "standard deviation of noise on the gradients, 0 for none"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser("python -m optimize_loss", description=__doc__)
    add, default = parser.add_argument, "; default: %(default)s"
    add("image", nargs="?", metavar="IMAGE", help="the photograph; default: a sample")
    add("--steps", type=int, default=paint.STEPS, metavar="N", help="how many" + default)
    add("--optimizer", default="Adam", metavar="NAME", help="which one" + default)
    add("--learning-rate", type=float, metavar="X", help="default: one that suits the optimizer")
    add("--clip", type=float, default=paint.CLIP, metavar="X", help=_CLIP + default)
    add("--noise", type=float, default=0.0, metavar="X", help=_NOISE + default)
    add("--out", default="painting", metavar="FOLDER", help="for the picture" + default)
    add("--seed", type=int, default=0, metavar="N", help="of the net and the batches" + default)
    add("--tensorboard", action="store_true", help="write a TensorBoard log to FOLDER as well")
    add("--version", action="version", version=ol.__version__)
    args = parser.parse_args(argv)
    _check(args)
    options = ("image", "steps", "optimizer", "learning_rate", "clip", "noise")
    args.plain = all(getattr(args, name) == parser.get_default(name) for name in options)
    return args


def _check(args: argparse.Namespace) -> None:
    try:
        check_integer("--steps", args.steps, COUNT)
        check_integer("--seed", args.seed, SEED)
        if args.learning_rate is not None:
            check_number("--learning-rate", args.learning_rate, POSITIVE)
        for name in ("clip", "noise"):
            check_number(f"--{name}", getattr(args, name), NOT_NEGATIVE)
        for name in ("learning_rate", "clip", "noise"):
            value = getattr(args, name)
            if value and not _LEAST <= value <= _MOST:
                flag = "--" + name.replace("_", "-")
                raise Refused(f"`{flag}` must be a float32. {received(flag, value)}")
    except ValueError as error:
        raise Refused(error) from error


def _run(args: argparse.Namespace) -> int:
    _check_extras(["matplotlib", "PIL", "tqdm"] + ["tensorboardX"] * args.tensorboard)
    _check_device()
    try:
        settings = paint.settings(
            args.steps,
            args.optimizer,
            args.learning_rate,
            args.clip,
            args.noise,
            ol.OPTIMIZER_SUMMARIES if args.tensorboard else None,
        )
        photo = read_photo(args.image)
    except ValueError as error:
        raise Refused(error) from error
    _check_out(args.out)
    path = os.path.join(args.out, "painting.png")
    runs = []
    try:
        for setting in settings:
            log = paint.run_folder(args.out, setting) if args.tensorboard else None
            runs.append(paint.train(setting, photo, args.steps, args.seed, log))
        save_picture(path, photo, runs)
    except OSError as error:
        raise Refused(f"The results cannot be written: {error}") from error
    code = _judge(runs[0], args.plain)
    _print_summary(runs)
    print(path)
    return code


def _check_extras(names: list[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Refused(
                f"A package is missing ({error}). Install it with: "
                "pip install -e '.[demo]' in a clone, or pip install 'optimize_loss[demo]'"
            ) from error


def _check_device() -> None:
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second one without a word
        raise Refused(
            "JAX finds no device: JAX_PLATFORMS must name those that this machine has, such as "
            f"cpu. Received: JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}. {error}"
        ) from error


def _check_out(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(f"`--out` must be a folder to write to. {error}") from error


def _judge(run: paint.Run, plain: bool) -> int:
    last = run.frames[-1]
    if math.isnan(last.psnr):
        why = f"The loss is not finite after step {last.step}: a lower --learning-rate may help."
    elif plain and last.psnr < TARGET:
        why = f"The painting has {last.quality}; without options it must reach {TARGET:g} dB."
    else:
        return 0
    print(f"python -m optimize_loss: {why}", file=sys.stderr)
    return 1


def _print_summary(runs: list[paint.Run]) -> None:
    wide = max(len(run.setting.label) for run in runs)
    print(f"{'setting':{wide}}  final PSNR  seconds")
    for run in runs:
        print(f"{run.setting.label:{wide}}  {run.frames[-1].quality:>10}  {run.seconds:7.1f}")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 130:  # an interrupted compilation may not survive the interpreter's own exit
        os._exit(code)
    sys.exit(code)
