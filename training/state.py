"""The state from which a run goes on exactly, in train_state.pt; of a sharded run see
sharding.py."""
import math
import os
from pathlib import Path

import torch

from common import rank_and_size, sum_over_ranks, write_atomically
from training.files import check_match, local_part


def make_folder(out_dir):
    """Create out_dir and see that it can be written to, before hours of work depend on it."""
    if not str(out_dir).strip():
        raise ValueError("out_dir is empty: choose a folder with --out_dir=...")
    folder = Path(out_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_text("")
        (folder / ".writable").unlink(missing_ok=True)  # every rank does this at once
    except OSError as error:
        raise OSError(f"cannot write to out_dir {out_dir} ({error.strerror or error}): choose "
                      "another with --out_dir=...") from None
    return folder


WHOLE = ("train_state.pt",)
SHARDED = ("train_state", "train_state.old")    # the other, if a kill came between two renames


def has_state(folder, names=WHOLE + SHARDED):
    """Whether a run in this folder got as far as a checkpoint."""
    return any((Path(folder) / name).exists() for name in names)


def resumes(resume, folder):
    """Whether a run goes on from `folder`: if it is told to, or if torchrun, which has lost a
    process, starts all of them anew with the same command (--max_restarts) and there is a state."""
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return resume or is_restart and has_state(folder)


def save_training(folder, model, optimizers, record, sharded=False):
    """Everything needed to go on: weights, optimizers and `record`, in train_state.pt alone
    (sharded: the folder train_state), so that a kill between two files cannot tear it apart.

    FloatingPointError, and nothing is written, if a weight is not finite.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    bad = not all(local_part(p).isfinite().all() for p in learning)
    if sum_over_ranks([float(bad)], learning[0].device)[0]:
        check_finite(math.nan, record["step"], folder, "a weight")
    if sharded:
        from training.sharding import save_sharded  # takes a second to import
        save_sharded(folder / "train_state", model, optimizers, **record)
    elif rank_and_size()[0] == 0:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        save_state(folder / "train_state.pt", state | record)


def load_training(folder, model, optimizers, must_match, sharded=False):
    """The record of what `save_training` wrote, the rest read into model and optimizers. ValueError
    if its "settings" differ in any item of `must_match`, or only the other kind of state is there.
    """
    own, other, way = WHOLE, SHARDED, "with --fsdp, by several processes"
    if sharded:
        own, other, way = SHARDED, WHOLE, "without --fsdp, or by one process"
    if has_state(folder, other) and not has_state(folder, own):
        raise ValueError(f"the run in {folder} was written {way}: resume it in that way")
    if sharded:
        from training.sharding import load_sharded
        return load_sharded(folder / "train_state", model, optimizers, must_match)
    state = load_state(folder / "train_state.pt", must_match)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:                                # names or shapes that are not the model's
        raise ValueError(f"{folder / 'train_state.pt'} holds another model than these settings "
                         "make: resume with those that the run began with") from None
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        # The saved groups bring their settings along. A learning rate is what it is set to now.
        peaks = [group.get("peak_lr") for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, peak in zip(optimizer.param_groups, peaks):
            if peak is not None:
                group["peak_lr"] = peak
    return state


def save_state(path, state):
    """torch.save: a kill or a full disk at any moment leaves the last good file."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path, must_match):
    """What torch.save wrote to `path`, plain types only. Raises FileNotFoundError or ValueError."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: there is nothing to resume; run without "
                                "--resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = dict(state["settings"])
    except Exception as error:      # unpickling a damaged file can raise anything
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it and start "
                         "again") from None
    check_match(path, settings, must_match)
    return state


def check_finite(value, step, folder, what="the loss"):
    """FloatingPointError for a number that is none."""
    if math.isfinite(value):
        return
    last = "no checkpoint was written yet"
    if has_state(folder):
        last = f"the last checkpoint is in {folder}"
    raise FloatingPointError(f"{what} is {value} at step {step}: lower the learning rate; {last}")
