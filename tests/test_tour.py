"""docs/tour.ipynb runs, and what it keeps is the run of the whole.

    python tests/test_tour.py       executes it in full, two minutes, and keeps the outputs
"""
import os
from pathlib import Path

import ipykernel_launcher
import nbformat
from nbclient import NotebookClient
from scripts import Script

TOUR = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"


def executed(timeout):
    """The notebook after all its cells ran in a kernel of their own. Raises CellExecutionError for
    the first that does not."""
    notebook = nbformat.read(TOUR, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False,
                            coalesce_streams=True,
                            resources={"metadata": {"path": str(TOUR.parent)}})
    return client.execute()


class ForkedKernel:
    """What jupyter_client asks of a kernel's process, of one that need not import torch."""
    stdin = stdout = stderr = None

    def __init__(self, command, env, **options):
        connection = command[command.index("-f"):]
        self.script = Script(ipykernel_launcher.__file__, *connection, environment=env,
                             before=os.setpgrp, folder=TOUR.parent, plots=True)
        self.process, self.pid = self.script.process, self.script.process.pid
        # Signals go to the kernel's group, which must not be ours.
        assert self.script.wait_for(lambda: os.getpgid(self.pid) == self.pid)

    def poll(self):
        return self.process.exitcode

    def wait(self):
        return self.script.wait().status


def test_every_cell_runs(monkeypatch):
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", ForkedKernel)
    monkeypatch.setenv("TOUR_STEPS", "10")          # training steps; every other size follows
    notebook = executed(timeout=120)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)


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
