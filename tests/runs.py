"""Runs of the recipes that take a second: their command lines, what is asked of their results, and
how two folders are found equal. conftest.py has the data that they learn from."""
import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

LAST_LINE = re.compile(
    r"val nelbo (\d+\.\d{4}) \+- (\d+\.\d{4}) nats/token, (\d+\.\d{3}) bits/byte")
SOLVE_RATE = re.compile(r"solve rate \d\.\d{3} \+- \d\.\d{3}, reward -?\d+\.\d{3}")
LAST_LINES = {"train_grpo.py": SOLVE_RATE}      # of all others: LAST_LINE
# What differs between two equal runs.
TIMES = {"elapsed_s", "tokens_per_s", "rollout_share"}

SHARED = ["--threads=1", "--dtype=float32", "--batch_size=4", "--max_steps=6", "--eval_interval=3",
          "--sample_tokens=4"]
SHAPE = ["--dim=16", "--n_layers=2", "--n_heads=2"]
CHAT = ["--init_from=tiny", "--vocab_size=300", "--seq_len=96", "--eval_sequences=4",
        "--final_eval_sequences=8"]
SETTINGS = {
    "train_scratch.py": [*SHAPE, "--tokenizer=byte", "--seq_len=16", "--eval_tokens=64",
                         "--final_eval_tokens=512"],
    "convert_bert.py": [*CHAT, *SHAPE, "--padding=hidden"],
    "convert_ar.py": [*CHAT, *SHAPE, "--anneal_steps=6"],
    "train_edits.py": [*SHAPE, "--tokenizer=byte", "--seq_len=16", "--eval_tokens=64",
                       "--final_eval_tokens=256"],
    "finetune_llada.py": [*CHAT, "--lora_rank=4", "--lora_dropout=0.2", "--lora_targets=q,v"],
    "train_grpo.py": ["--init_from=tiny", "--seq_len=96", "--max_new_tokens=6", "--prompts=2",
                      "--group_size=4", "--eval_prompts=4", "--reward=contains"],
}
DATA_SETTINGS = {"train_grpo.py": "task"}       # what names the data; of all others: dataset


def command(script, out_dir, data, *settings):
    """The script and the arguments of a run of a second on the file `data`; later settings overrule
    earlier ones."""
    name = DATA_SETTINGS.get(script, "dataset")
    return [script, *SHARED, *SETTINGS[script], f"--{name}={data}", f"--out_dir={out_dir}",
            *settings]


# --------------------------------------------------------------------------------------------------
# What a run said


def succeed(*results):
    """The first of the results, all of which ended well."""
    assert all(result.status == 0 for result in results), results
    return results[0]


def refused(result, *words):
    """Exit status 2, and nothing but one line that holds all the words."""
    assert result.status == 2 and result.out == "", result
    assert re.fullmatch(r"error: [^\n]*\n", result.err), result.err
    assert all(word in result.err for word in words), result.err
    return True


# --------------------------------------------------------------------------------------------------
# What it took


def cost_of_reading(name):
    """(bytes of a model's weights, bytes at the peak above what the process had, seconds of CPU) of
    reading it in this process."""
    import pretrained.gguf  # noqa: F401 (no part of it)
    from experiments.timing import memory
    from model import Transformer

    before, started = memory("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")           # the high-water mark starts here
    model = Transformer.from_pretrained(name)
    size = sum(parameter.nbytes for parameter in model.parameters())
    return size, memory("VmHWM") - before, time.process_time() - started


# --------------------------------------------------------------------------------------------------
# What a run left


def rows(folder):
    """log.jsonl without what the clock says."""
    found = []
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.append({name: value for name, value in row.items() if name not in TIMES})
    return found


def state_of(folder):
    state = torch.load(Path(folder) / "train_state.pt", weights_only=True)
    return {name: state[name] for name in ("model", "optimizers", "step")}


def learned(folder):
    """The tensors of an adapter, or of a model where there is none."""
    adapter = Path(folder) / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else Path(folder) / "model.safetensors")


def contents(folder):
    """A hash of each file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in Path(folder).iterdir()}


def equal(a, b, tolerance=0.0):
    """Whether two nests of dicts, lists, tensors and numbers are the same."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if not tolerance else torch.allclose(a, b, rtol=0, atol=tolerance)
    return a == b or (tolerance > 0 and isinstance(a, float) and abs(a - b) <= tolerance)


def same_run(a, b):
    """Two folders hold the same run, bit for bit: weights, optimizer, log; and nothing is left
    lying about."""
    assert equal(state_of(a), state_of(b))
    assert rows(a) == rows(b)
    weights = [(Path(folder) / "model.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]
    assert contents(a).keys() == contents(b).keys()


# --------------------------------------------------------------------------------------------------
# Damage


def forget_the_repository():
    """In a script's process: no module of this repository is imported yet, and none can be but from
    the folder it was started in."""
    root = Path(__file__).resolve().parent.parent
    ours = {path.stem for path in root.iterdir()}
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            del sys.modules[name]
    sys.path[:] = [os.getcwd(), *(path for path in sys.path if not path.startswith(str(root)))]


class Killer:
    """Kills its process at the n-th time that a file is flushed or renamed; half way through the
    n-th file, if `half`."""

    def __init__(self, n, half=""):
        self.n, self.half = n, half

    def __call__(self):
        from training import files

        watched = {
            "": [(os, "fsync"), (os, "replace")],
            "state": [(torch, "save")],
            "model": [(files, "save_file")],
        }
        for module, name in watched[self.half]:
            setattr(module, name, self.watch(getattr(module, name)))

    def watch(self, function):
        def watched(*arguments, **options):
            self.n -= 1
            if self.n == 0:
                if self.half:
                    function(*arguments, **options)
                    file = arguments[1]
                    os.truncate(file if isinstance(file, str) else file.fileno(), 5000)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return watched


class SignalAt:
    """Sends its process a signal when the n-th batch of conversations is read. The first is read
    early, to see that there is enough text; number n + 2 is that of step n. rank: of the only
    process that gets it; None: all do."""

    def __init__(self, n, number=signal.SIGINT, rank=None):
        self.n, self.number, self.rank = n, number, rank

    def __call__(self):
        from data.chat import ChatDataset

        batch = ChatDataset.batch

        def counted(*arguments, **options):
            self.n -= 1
            if self.n == 0 and self.rank in (None, int(os.environ.get("RANK", 0))):
                os.kill(os.getpid(), self.number)
            return batch(*arguments, **options)

        ChatDataset.batch = counted
