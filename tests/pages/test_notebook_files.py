"""The notebooks that are shown have the cells of their Python files, and no trace of a machine."""

import base64
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
AGAIN = "Make it again: python .github/notebooks.py"
MOST_BYTES = 300_000
FOLDERS = "home|root|tmp|work|usr|var|Users|private"
TRACES = re.compile(rf"0x[0-9a-f]{{6}}|/({FOLDERS})/|Traceback|Warning:")


def cells_of_python(text):
    """Return the kind and text of each cell of a file in the percent format."""
    _, *cells = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    pairs = zip(cells[::2], cells[1::2], strict=True)
    return [cell(kind.strip() == "[markdown]", text) for kind, text in pairs]


def cell(is_markdown, text):
    if is_markdown:
        return "markdown", re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip()
    return "code", text.strip()


def read(source):
    made = source.with_suffix(".ipynb")
    assert made.exists(), AGAIN
    return json.loads(made.read_text())


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def test_cells_of_the_percent_format():
    head = "# ---\n# jupyter:\n# ---\n\n"
    text = head + "# %% [markdown]\n# # Title\n#\n# words\n\n# %%\nx = 1  # %%\n\n\n"
    assert cells_of_python(text) == [("markdown", "# Title\n\nwords"), ("code", "x = 1  # %%")]


def test_each_notebook_has_a_python_file():
    made = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert made == [path.stem for path in SOURCES], AGAIN


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_python_file(source):
    cells = [(x["cell_type"], "".join(x["source"]).strip()) for x in read(source)["cells"]]
    assert cells == cells_of_python(source.read_text()), AGAIN


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_was_executed_without_errors_and_has_a_picture(source):
    found = outputs(read(source))
    assert not [output for output in found if output["output_type"] == "error"]
    pictures = [x["data"]["image/png"] for x in found if "image/png" in x.get("data", {})]
    assert pictures
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_tells_nothing_of_the_machine(source):
    notebook = read(source)
    assert source.with_suffix(".ipynb").stat().st_size < MOST_BYTES
    for output in outputs(notebook):
        texts = output.get("text", ()), output.get("data", {}).get("text/plain", ())
        assert not TRACES.search("".join(map("".join, texts)))
        assert output.get("name") != "stderr"
        assert output.get("execution_count") is None
    assert {x.get("execution_count") for x in notebook["cells"]} == {None}
    assert {str(x["metadata"]) for x in notebook["cells"]} == {"{}"}
    assert sorted(notebook["metadata"]) == ["kernelspec", "language_info"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_site_has_a_page_of_each_notebook(source):
    page = ROOT / "docs" / "notebooks" / f"{source.stem}.md"
    assert f'{{{{ notebook("{source.stem}") }}}}' in page.read_text()
    assert f'"notebooks/{page.name}"' in (ROOT / "zensical.toml").read_text()
    assert f"(notebooks/{page.name})" in (ROOT / "docs" / "index.md").read_text()


def test_the_site_leads_to_every_page():
    nav = (ROOT / "zensical.toml").read_text()
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if f'"{page.as_posix()}"' not in nav]
