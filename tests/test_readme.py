"""Every Python block of the README and of the pages runs, in order, each file as one session."""

import json
import pathlib
import re

import jax
import pytest

import optimize_loss as ol

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PRINTED = {"README.md": "gradient_norm/dense/kernel", "docs/migration.md": "'adam/m/w'"}


def pages():
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", pages())
def test_the_blocks_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    session: dict[str, object] = {"__name__": page}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(block, session)
    assert PRINTED.get(page, "") in capsys.readouterr().out


@pytest.mark.parametrize("page", pages())
def test_the_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    linked = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text)
    missing = [x for x in linked if not (ROOT / page).parent.joinpath(x).exists()]
    missing += [x for x in re.findall(r"`(tests/\w+\.py)`", text) if not (ROOT / x).exists()]
    assert not missing


def test_the_readme_names_all_links():
    kinds = (ol.transforms.Link, ol.transforms.ForParameters, ol.transforms.ClipByFunction)
    bases = {"Link", "TreeLink"}
    public = {name: getattr(ol.transforms, name) for name in set(ol.transforms.__all__) - bases}
    links = {name for name, x in public.items() if isinstance(x, type) and issubclass(x, kinds)}
    text = README.read_text()
    assert not [name for name in links if f"`{name}`" not in text]


@pytest.mark.parametrize("command", ["python -m optimize_loss", "python -m pytest"])
def test_the_first_screen_has_the_commands(command):
    first_screen = README.read_text().splitlines()[:30]
    assert any(command in line and "python3 -m venv" in line for line in first_screen)


RESULTS = README.parent / "benchmarks" / "results"


def test_the_table_of_speed_is_what_the_benchmarks_recorded():
    recorded = (RESULTS / "table-cpu.md").read_text()
    shown = README.read_text().partition("| | peer | peer / ours |")[2].partition("\n\n")[0]
    rows = shown.splitlines()[2:]
    assert len(rows) > 15
    assert not [row for row in rows if row not in recorded.splitlines()]
    missed = [row for row in recorded.splitlines() if "**not met**" in row]
    assert not [row for row in missed if row not in rows]
    versions = json.loads((RESULTS / "update-cpu.json").read_text())["machine"]["versions"]
    for name in ("jax", "optax", "keras", "torch"):
        assert f"{name} {versions[name]}" in README.read_text()


def test_the_figures_of_the_older_jax_are_what_the_benchmark_recorded():
    result = json.loads((RESULTS / "update-jax-0.8.json").read_text())
    large = [f"{r['ratio']:.2f}" for r in result["update"] if r["parameters"] == 10_000_000]
    assert f"{' and '.join(large)} at 1e7" in README.read_text()
