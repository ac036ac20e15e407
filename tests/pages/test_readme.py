"""Every Python block of the README and of the pages runs, and prints what its comments say.

A page is one session, from its first block to its last. The recipes are one session each, after the
blocks before the first heading.
"""

import contextlib
import io
import json
import pathlib
import re
import sys
import tempfile

import jax
import pytest

import optimize_loss as ol
from tests.cases import on_eight_devices

ROOT = pathlib.Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PRINTED = {"README.md": "body/kernel", "docs/migration.md": "'adam/m/w'"}
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def pages():
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def sessions():
    """Return the blocks that run one after the other, by the page, or the heading of a recipe."""
    made = {page: blocks((ROOT / page).read_text()) for page in pages()}
    del made["docs/recipes.md"]
    start, *recipes = re.split(r"^## ", (ROOT / "docs/recipes.md").read_text(), flags=re.MULTILINE)
    for recipe in recipes:
        heading = recipe.partition("\n")[0]
        made[heading] = blocks(start) + blocks(recipe)
    return made


SESSIONS = sessions()


def run(block, session):
    """Run a block; return what each of its lines printed, by the number of the line from 0 on."""
    printed = {}

    def keep(*values):
        print(*values)
        line = sys._getframe(1).f_lineno - 1
        printed.setdefault(line, []).append(" ".join(map(str, values)))

    session["print"] = keep
    exec(block, session)
    return printed


def alike(said, printed):
    """Return whether two texts have the same words, and numbers that agree to the digits said."""
    if NUMBER.split(said) != NUMBER.split(printed):
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(printed), strict=True)
    digits = [(float(a), float(b), len(a.partition(".")[2])) for a, b in pairs]
    return all(abs(a - b) <= 0.51 * 10**-places for a, b, places in digits)


ON_EIGHT_DEVICES = "docs/devices.md"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")
@pytest.mark.parametrize("name", [name for name in SESSIONS if name != ON_EIGHT_DEVICES])
def test_the_blocks_run_and_print_what_they_say(name, capsys, tmp_path, monkeypatch):
    """A comment behind a `print` is what is printed, then perhaps a colon and a remark."""
    monkeypatch.chdir(tmp_path)
    assert differences(name) == []
    assert PRINTED.get(name, "") in capsys.readouterr().out


def differences(name):
    """Return each line that prints something else than its comment says, and what that is."""
    session: dict[str, object] = {"__name__": name}
    found = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in SESSIONS[name]:
            printed = run(block, session)
            for i, line in enumerate(block.splitlines()):
                call, _, comment = line.partition(" # ")
                if call.strip().startswith("print(") and comment:
                    said = comment.strip().partition(": ")[0]
                    came = ", ".join(printed[i])
                    found += [] if alike(said, came) else [(line, came)]
    return found


def differences_on_eight_devices():
    with contextlib.chdir(tempfile.mkdtemp()), contextlib.redirect_stdout(io.StringIO()):
        return json.dumps(differences(ON_EIGHT_DEVICES))


def test_the_blocks_for_eight_devices_do_so_too():
    assert on_eight_devices("tests.pages.test_readme", "differences_on_eight_devices") == []


@pytest.mark.parametrize("page", pages())
def test_the_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    linked = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text)
    missing = [x for x in linked if not (ROOT / page).parent.joinpath(x).exists()]
    missing += [x for x in re.findall(r"`(tests/[\w/]+\.py)`", text) if not (ROOT / x).exists()]
    assert not missing


def test_the_reference_names_all_links():
    kinds = (ol.transforms.Link, ol.transforms.ForParameters, ol.transforms.ClipByFunction)
    bases = {"Link", "TreeLink", "Gate"}
    public = {name: getattr(ol.transforms, name) for name in set(ol.transforms.__all__) - bases}
    links = {name for name, x in public.items() if isinstance(x, type) and issubclass(x, kinds)}
    text = (ROOT / "docs/api/links.md").read_text()
    assert not [name for name in links if f"optimize_loss.transforms.{name}\n" not in text]


@pytest.mark.parametrize("command", ["python -m optimize_loss", "python -m pytest"])
def test_the_first_screen_has_the_commands(command):
    first_screen = README.read_text().splitlines()[:30]
    assert any(command in line and "python3 -m venv" in line for line in first_screen)


RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"


def test_the_table_of_speed_is_what_the_benchmarks_recorded():
    recorded = (RESULTS / "table-cpu.md").read_text()
    shown = BENCHMARKS.read_text().partition("| | peer | peer / ours |")[2].partition("\n\n")[0]
    rows = shown.splitlines()[2:]
    assert len(rows) > 15
    assert not [row for row in rows if row not in recorded.splitlines()]
    missed = [row for row in recorded.splitlines() if "**not met**" in row]
    assert not [row for row in missed if row not in rows]
    versions = json.loads((RESULTS / "update-cpu.json").read_text())["machine"]["versions"]
    for name in ("jax", "optax", "keras", "torch"):
        assert f"{name} {versions[name]}" in BENCHMARKS.read_text()


def test_the_readme_shows_some_of_these_rows():
    shown = README.read_text().partition("| | peer | peer / ours |\n")[2].partition("\n\n")[0]
    rows = [row.removesuffix(" |") for row in shown.splitlines()[1:]]
    assert len(rows) >= 6
    assert not [row for row in rows if f"{row} | " not in BENCHMARKS.read_text()]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 160


def test_the_figures_of_the_older_jax_are_what_the_benchmark_recorded():
    result = json.loads((RESULTS / "update-jax-0.8.json").read_text())
    large = [f"{r['ratio']:.2f}" for r in result["update"] if r["parameters"] == 10_000_000]
    assert f"{' and '.join(large)} at 1e7" in BENCHMARKS.read_text()
