"""The record: how good is a model after ten minutes on two threads? Rules and table:
docs/records.md.

    python experiments/record.py run OUT ENTRY[,ENTRY...] SEED[,SEED...] [pydocs|tales]
        trains what OUT does not hold yet, ten minutes on pydocs and ten on tales a seed, or on one
        of them alone
    python experiments/record.py table OUT
        prints the table of what OUT holds

ENTRY is a name below or a script, FILE.py, that takes train_scratch.py's --dataset, --out_dir,
--seed, --max_minutes and --threads. A killed run goes on where it was.
"""
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)

from experiments.recipes import log_of, run_recipe  # noqa: E402
from experiments.results import is_done  # noqa: E402
from experiments.tales import score, write  # noqa: E402
from sampling.sampler import Sampler  # noqa: E402

MINUTES = 10
TALES = 200                 # written by each model of tales
# Settings of train_scratch.py, the oldest entry first.
ENTRIES = {
    # AdamW, every rate the same, no clipping of the weight: what papers do
    "plain": dict(optimizer="adamw", learning_rate=1e-3, embedding_lr=1e-3, weight_decay=0.1,
                  decay="cosine", batch_size=32, max_weight=0, look_beside=False),
    # Muon, clipped weight, small updates: the recipe until tales showed that it did not look back
    "muon": dict(embedding_lr=3e-3, look_beside=False),
    # and a rate of its own for the embedding
    "embedding": dict(look_beside=False),
    # and two heads that begin by looking beside: train_scratch.py as it is
    "beside": {},
}


def run(out, entries, seeds, datasets="pydocs,tales"):
    for seed in seeds.split(","):
        for entry in entries.split(","):
            for dataset in datasets.split(","):
                folder = folder_of(out, entry, dataset, seed)
                if not is_done(folder):
                    train(entry, folder, dataset, seed)
                print(f"{folder}: {json.dumps(measure(folder, dataset))}", flush=True)


def folder_of(out, entry, dataset, seed):
    return Path(out, f"{Path(entry).stem}-{dataset}-{seed}")


def train(entry, folder, dataset, seed):
    """Ten minutes of an entry, or what is left of them."""
    script, settings = "train_scratch.py", {}
    if entry.endswith(".py"):
        script = entry
    elif entry in ENTRIES:
        settings = ENTRIES[entry]
    else:
        raise ValueError(f"no entry called {entry!r}: there are {', '.join(ENTRIES)}, or a script")
    settings = settings | dict(dataset=dataset, seed=seed, max_minutes=MINUTES,
                               threads=2, device="cpu", eval_interval=100, eval_tokens=2048,
                               sample_tokens=0)
    run_recipe(script, folder, *[f"--{name}={value}" for name, value in settings.items()])


def measure(folder, dataset):
    """The figures of a finished run; those of tales are kept in its folder, for they take long."""
    last = log_of(folder)[-1]
    found = {"updates": last["step"], "bits/byte": round(last["val_bpb"], 4)}
    if dataset == "pydocs":
        return found
    kept = folder / "tales.json"
    if not kept.exists():
        tales_score = score(write(Sampler.load(folder), TALES))
        kept.write_text(json.dumps(vars(tales_score)))
    tales = json.loads(kept.read_text())
    return found | {"nelbo": round(last["val_nelbo"], 4), "restored": round(last["restored"], 3),
                    "sentences": round(tales["grammatical"], 3),
                    "consistent": round(tales["consistent"], 3)}


def table(out):
    """A line an entry: the mean and the spread over its seeds."""
    print("| entry | seeds | pydocs, bits/byte | tales, nats/token | restored | sentences | "
          "consistent |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    entries = sorted({folder.name.rsplit("-", 2)[0] for folder in Path(out).iterdir()})
    for entry in entries:
        rows = {"pydocs": [], "tales": []}
        for dataset, found in rows.items():
            for folder in sorted(Path(out).glob(f"{entry}-{dataset}-*")):
                if is_done(folder):
                    found.append(measure(folder, dataset))
        cells = [spread([row["bits/byte"] for row in rows["pydocs"]])]
        for name in ("nelbo", "restored", "sentences", "consistent"):
            cells.append(spread([row[name] for row in rows["tales"]]))
        seeds = max(len(found) for found in rows.values())
        print(f"| {entry} | {seeds} | {' | '.join(cells)} |")


def spread(values):
    """"mean (lowest to highest)"."""
    if not values:
        return ""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


COMMANDS = {"run": run, "table": table}

if __name__ == "__main__":
    common.show_errors_in_one_line()
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
