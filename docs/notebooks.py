"""Build the notebooks of the pages, with their outputs, and the pictures of the pages.

    pip install -e '.[docs]' && python docs/notebooks.py

A page is a Markdown file. Each of its Python blocks becomes a cell. If a block shows a picture, the line `![...](NAME.png)`
after the block names the file for that picture. The notebook has the picture as an output instead of this line.
"""

import base64
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import replacing, save_json

DOCS = Path(__file__).resolve().parent
PAGES = ("tutorial", "diffusion")
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"^!\[[^\]]*\]\(([^)]+\.png)\)\n*", re.MULTILINE)


def cells(page: str) -> list[dict[str, Any]]:
    """Return the cells of a page, without outputs, in the format of Jupyter notebooks (version 4.5)."""
    made: list[dict[str, Any]] = []
    for place, part in enumerate(BLOCK.split((DOCS / f"{page}.md").read_text(encoding="utf-8"))):
        if place % 2:
            code = {"cell_type": "code", "source": part.rstrip("\n"), "execution_count": None, "outputs": []}
            made.append({"id": f"cell-{place}", "metadata": {}, **code})
        elif words := PICTURE.sub("", part).strip():
            made.append({"id": f"cell-{place}", "metadata": {}, "cell_type": "markdown", "source": words})
    return made


def pictures(page: str) -> list[str | None]:
    """Return, for each code cell of a page, the name of its picture, or None if it has none."""
    _, *rest = BLOCK.split((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    found = (PICTURE.match(after.lstrip("\n")) for after in rest[1::2])
    return [match and match[1] for match in found]


def run(page: str) -> dict[str, Any]:
    """Execute a page's cells in order, and return the notebook with their outputs."""
    # Imported here, because comparing pages with notebooks needs neither.
    import nbformat
    from nbclient import NotebookClient

    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook = nbformat.from_dict({"cells": cells(page), "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    return json.loads(nbformat.writes(notebook))


def main() -> None:
    """Run all pages; write the notebooks and the pictures."""
    for page in PAGES:
        notebook = run(page)
        codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for cell, name in zip(codes, pictures(page), strict=True):
            shown = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
            if len(shown) != (name is not None):
                raise UserError(
                    f"{page}.md: the cell before {name} shows {len(shown)} pictures; each needs one line of its own"
                )
            if name is not None:
                with replacing(DOCS / name) as temporary:
                    temporary.write_bytes(base64.b64decode(shown[0]))
        save_json(DOCS / f"{page}.ipynb", notebook)
        print(f"wrote {page}.ipynb and {sum(name is not None for name in pictures(page))} pictures")


if __name__ == "__main__":
    with exit_on_error():
        main()
