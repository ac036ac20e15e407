"""For the pages: `{{ notebook("quickstart") }}` shows an executed notebook, with its pictures."""

import json
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
FENCE = "~~~~~~"  # no notebook has it


def define_env(env: Any) -> None:
    """Give the pages the function; zensical calls this."""
    env.macro(notebook)


def notebook(name: str) -> str:
    """Return a notebook as Markdown."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return "\n\n".join(block for cell in cells for block in blocks(cell))


def blocks(cell: dict[str, Any]) -> list[str]:
    """Return a cell as Markdown: its text, and what it put out."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [fenced("python", source), *map(shown, cell["outputs"])]


def shown(output: dict[str, Any]) -> str:
    """Return an output as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        return f'<p><img alt="picture" src="data:image/png;base64,{encoded}"></p>'
    return fenced("text", "".join(output.get("text") or data["text/plain"]))


def fenced(language: str, text: str) -> str:
    """Return a block of code."""
    return f"{FENCE}{language}\n{text.rstrip()}\n{FENCE}"
