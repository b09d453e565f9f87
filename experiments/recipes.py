"""How experiments run the recipes, and read what those wrote."""
import json
import subprocess
import sys
from pathlib import Path

from training.state import has_state

ROOT = Path(__file__).resolve().parent.parent


def run_recipe(script, folder, *arguments, quiet=False):
    """Run a recipe into `folder`, or go on with a run that was killed there.

    One that fails has said why, and its exit status is ours (SystemExit).
    """
    command = [sys.executable, str(ROOT / script), f"--out_dir={folder}", *arguments]
    if has_state(folder):
        command.append("--resume=True")
    output = subprocess.DEVNULL if quiet else None
    status = subprocess.run(command, stdout=output).returncode
    if status:
        sys.exit(status)


def rows_of(path):
    """The objects in a .jsonl file; none if it does not exist."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def log_of(folder):
    """The evaluations of a run, a dict each; none if it has not begun."""
    return rows_of(Path(folder, "log.jsonl"))
