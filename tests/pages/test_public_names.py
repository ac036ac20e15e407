"""Each public name has one path, a docstring whose arguments are those of the signature, an example
that runs (as a doctest), and a place in the pages of reference."""

import inspect
import pathlib
import re
import textwrap

import pytest

import optimize_loss as ol
from optimize_loss import keras, loggers, tensorboard

ROOMS = (ol, ol.transforms, ol.optimizers, ol.schedules, ol.plot)
PAGES = pathlib.Path(__file__).parent.parent.parent / "docs" / "api"
# Arguments of `optimize_loss` that are at hand beside it, and what they are among the links.
OTHER_WORDS = {"Precision": "Precision", "Spike": "SkipSpikes"}
EXTRAS = {"keras.KerasOptimizer": keras, "tensorboard.TensorBoardWriter": tensorboard}
EXTRAS |= {f"loggers.{name}": loggers for name in loggers.__all__}

NAMES = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in ROOMS
    for name in room.__all__
    if not inspect.ismodule(getattr(room, name))
    if not (room is ol.transforms and name in OTHER_WORDS)  # the same name: told once
}
NAMES |= {f"optimize_loss.{x}": getattr(room, x.split(".")[1]) for x, room in EXTRAS.items()}
CLASSES = {name: x for name, x in NAMES.items() if inspect.isclass(x)}
ERRORS = {name for name, x in CLASSES.items() if issubclass(x, Exception)}
FUNCTIONS = {name: x for name, x in NAMES.items() if inspect.isroutine(x)}
METHODS = {
    f"{path}.{name}": x
    for path, made in (CLASSES | {"optimize_loss.transforms.Chain": ol.transforms.Chain}).items()
    for name, x in vars(made).items()
    if inspect.isfunction(x) and (not name.startswith("_") or name == "__call__")
}


def described(thing, section="Args"):
    """Return the names that a section of the docstring describes; None without the section."""
    text = inspect.cleandoc(thing.__doc__ or "")
    found = re.search(rf"^{section}:\n((?:  .*\n|\n)*)", text + "\n", re.MULTILINE)
    if found is None:
        return None
    return re.findall(r"^\**(\w+):", textwrap.dedent(found[1]), re.MULTILINE)


def accepted(thing):
    parameters = inspect.signature(thing).parameters
    return [name for name in parameters if name not in ("self", "cls")]


def test_each_name_has_one_path():
    seen = {}
    everything = [(name, getattr(room, name)) for room in ROOMS for name in room.__all__]
    for path, thing in everything:
        if inspect.isroutine(thing) or inspect.isclass(thing):
            seen.setdefault(id(thing), []).append(path)
    twice = [paths for paths in seen.values() if len(paths) > 1]
    assert sorted(twice) == [[short, long] for short, long in OTHER_WORDS.items()]


@pytest.mark.parametrize("room", ROOMS[:-1], ids=lambda room: room.__name__)
def test_what_is_public_is_listed(room):
    shown = [n for n, x in vars(room).items() if not n.startswith("_") and not inspect.ismodule(x)]
    assert sorted(set(shown) - set(room.__all__)) == []


@pytest.mark.parametrize("path", sorted(CLASSES | FUNCTIONS))
def test_it_has_a_docstring_with_an_example(path):
    text = inspect.cleandoc(NAMES[path].__doc__ or "")
    assert text.partition("\n")[0].rstrip().endswith((".", ":", "`")), text[:80]
    assert path in ERRORS or ">>> " in text


@pytest.mark.parametrize("path", sorted(FUNCTIONS))
def test_the_arguments_described_are_those_of_the_signature(path):
    assert (described(FUNCTIONS[path]) or []) == accepted(FUNCTIONS[path])


@pytest.mark.parametrize("path", sorted(METHODS))
def test_so_are_those_of_methods(path):
    """Methods of links, of schedules and of optimizers are described once, where all share them."""
    names = described(METHODS[path])
    if path.count(".") == 2 and path not in WITHOUT_ARGS:
        assert (names or []) == accepted(METHODS[path])
    assert names is None or names == accepted(METHODS[path])


WITHOUT_ARGS = {
    "optimize_loss.Precision.formats": "what the package calls",
    "optimize_loss.Spike.scalars": "a function of links",
    "optimize_loss.TrainState.repacked": "what the package calls",
    "optimize_loss.TrainStep.lower": "it takes what the step takes",
    "optimize_loss.Variable.is_elsewhere": "what the package calls",
}


@pytest.mark.parametrize("path", sorted(set(CLASSES) - ERRORS))
def test_the_arguments_described_are_those_of_the_class(path):
    made = CLASSES[path]
    names = described(made)
    if issubclass(made, ol.optimizers.Optimizer):  # those that all share are described once
        assert set(names or []) <= set(accepted(made))
    elif names is not None:
        assert names == accepted(made)
    else:
        attributes = described(made, "Attributes") or []
        assert set(accepted(made)) - set(attributes) <= FREE


FREE = {"links", "precision", "kwargs", "args"}


@pytest.mark.parametrize("path", sorted(NAMES))
def test_it_is_in_the_pages_of_reference(path):
    pages = [page.read_text().splitlines() for page in PAGES.glob("*.md")]
    assert sum(lines.count(f"::: {path}") for lines in pages) == 1


def test_the_pages_of_reference_name_nothing_else():
    text = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
    assert sorted(re.findall(r"^::: (.*)$", text, re.MULTILINE)) == sorted(NAMES)
