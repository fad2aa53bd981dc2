"""Run the notebooks in a folder of their own, and write their outputs anew: what GitHub shows is of the last run.

What libraries say on stderr is left out, as are times of running.

Usage:
    python notebooks/run.py [NAME ...]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LONGEST = 1200
"""Seconds that a cell may take."""


def clean(cell: Any) -> None:
    """Leave text, tables and images of a cell's outputs."""
    cell.metadata.pop("execution", None)
    # What shows progress is HTML: it is there only where something is fetched.
    cell.outputs = [
        out for out in cell.outputs if out.get("name") != "stderr" and "text/html" not in out.get("data", {})
    ]
    for out in cell.outputs:
        data = out.get("data", {})
        if len(data) > 1:
            data.pop("text/plain", None)
        if "metadata" in out:
            out.metadata.clear()


def run(path: Path) -> None:
    """Run one notebook from its first cell to its last.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; nothing is written then.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="quickmerge-notebook-") as folder:
        NotebookClient(
            notebook, timeout=LONGEST, resources={"metadata": {"path": folder}}, record_timing=False
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            clean(cell)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


def main() -> None:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help="without the folder and .ipynb; default: all")
    names = parser.parse_args().names or sorted(path.stem for path in HERE.glob("*.ipynb"))
    for name in names:
        began = time.monotonic()
        run(HERE / f"{name}.ipynb")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
