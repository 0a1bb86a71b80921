"""Make tour.ipynb from tour.py and run it: a notebook's cells are the parts between `# %%` lines.

python examples/make_tour.py
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import v4

FOLDER = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cells(source: str) -> list[Any]:
    """The cells of a script; lines of text lose their "# "."""
    found: list[Any] = []
    for kind, text in re.findall(r"(?ms)^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source):
        make = v4.new_markdown_cell if kind else v4.new_code_cell
        text = re.sub(r"(?m)^# ?", "", text) if kind else text
        found.append(make(text.strip(), id=f"cell-{len(found)}"))
    return found


def notebook() -> Any:
    """The notebook, not run yet."""
    made = v4.new_notebook(cells=cells((FOLDER / "tour.py").read_text(encoding="utf-8")))
    made.metadata.update(kernelspec=KERNEL, language_info={"name": "python"})
    return made


def executed() -> Any:
    """The notebook with what its cells print and draw; raises at the first cell that fails."""
    made = notebook()
    with tempfile.TemporaryDirectory() as desk:  # it saves a forecaster
        run = {"timeout": 1200, "record_timing": False, "resources": {"metadata": {"path": desk}}}
        NotebookClient(made, **run).execute()
    for cell in made.cells:
        if cell.cell_type == "code":  # what libraries say when they are loaded is not kept
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return made


if __name__ == "__main__":
    nbformat.write(executed(), FOLDER / "tour.ipynb")
