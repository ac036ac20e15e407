"""Make the notebooks that are shown from their Python files, by executing them.

`python .github/notebooks.py` makes all, and with names, such as `quickstart`, those.
"""

import base64
import io
import os
import pathlib
import sys
import tempfile

import jupytext
import nbclient
import nbformat
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PICTURES = "figure.dpi: 80\n"


def prepare(folder: str) -> None:
    """Let kernels see this checkout, one CPU device, and the size of pictures."""
    settings = pathlib.Path(folder, "matplotlibrc")
    settings.write_text(PICTURES)
    for name in ("JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64", "MPLBACKEND", "XLA_FLAGS"):
        os.environ.pop(name, None)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "MATPLOTLIBRC": str(settings),
        "PYTHONPATH": str(ROOT),
    }


def smaller(picture: str) -> str:
    """Return a PNG in base64 with at most 256 colours, which takes a quarter."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    made = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode()


def without_traces(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook without what differs from one execution to the next."""
    for cell in notebook.cells:
        cell.pop("id", None)
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
        for output in cell.get("outputs", ()):
            if "execution_count" in output:
                output.execution_count = None
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    language = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    notebook.metadata = {"kernelspec": KERNEL, "language_info": language}
    notebook.nbformat_minor = 4  # the last one in which cells have no id
    return notebook


def make(path: pathlib.Path, folder: str) -> None:
    """Execute the notebook of a Python file, and write it beside that."""
    notebook = jupytext.read(path)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
    )
    made = path.with_suffix(".ipynb")
    nbformat.write(without_traces(client.execute()), made)
    print(f"{made.name}: {made.stat().st_size / 1e3:.0f} kB")


def main(names: list[str]) -> None:
    """Make the notebooks of these names, or all."""
    paths = sorted((ROOT / "notebooks").glob("*.py"))
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        for path in paths:
            if path.stem in names or not names:
                make(path, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
