"""docs/tour.ipynb runs, and what it keeps is the run of the whole.

    python tests/test_tour.py       executes it in full, two minutes, and keeps the outputs
"""
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TOUR = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"


def executed(timeout):
    """The notebook after all its cells ran in a kernel of their own. Raises CellExecutionError for
    the first that does not."""
    notebook = nbformat.read(TOUR, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False,
                            coalesce_streams=True,
                            resources={"metadata": {"path": str(TOUR.parent)}})
    return client.execute()


def test_every_cell_runs(monkeypatch):
    monkeypatch.setenv("TOUR_STEPS", "10")          # training steps; every other size follows
    notebook = executed(timeout=120)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)


def test_outputs_are_kept():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code[1:])   # the first one only imports
    assert TOUR.stat().st_size < 400_000


if __name__ == "__main__":
    os.environ.pop("TOUR_STEPS", None)
    nbformat.write(executed(timeout=600), TOUR)
