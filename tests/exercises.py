"""The answers to README's exercises: one constant of train_scratch.py changed at a time, on pydocs, a minute or two each.

    python tests/exercises.py OUT.jsonl [SEED,SEED]         trains what OUT lacks, then prints the table

Everything is counted in tokens (2,048 an update, 800 updates), not in minutes, so that a busy machine changes nothing.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = dict(dim=128, n_layers=4, seq_len=128, batch_size=16, max_steps=800, eval_interval=0, sample_tokens=0)
EXERCISES = {       # name: what it changes
    "as it is": {},
    "optimizer=adamw": dict(optimizer="adamw"),
    "max_weight=0": dict(max_weight=0.0),
    "max_weight=1": dict(max_weight=1.0),
    "schedule=cosine": dict(schedule="cosine"),
    "decay=cosine": dict(decay="cosine"),
    "warmup=0.3": dict(warmup=0.3),
    "batch_size=64, max_steps=200": dict(batch_size=64, max_steps=200),
    "seq_len=32, batch_size=64": dict(seq_len=32, batch_size=64),
    "n_layers=8, dim=96": dict(n_layers=8, dim=96),
    "tokenizer=byte": dict(tokenizer="byte"),
    "vocab_size=512": dict(vocab_size=512),
    "objective=ar": dict(objective="ar"),
    "objective=bd3lm, block_length=4": dict(objective="bd3lm", block_length=4),
    "objective=bd3lm, block_length=32": dict(objective="bd3lm", block_length=32),
}


def run(settings):
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--{name}={value}" for name, value in {**BASE, **settings, "out_dir": folder}.items()]
        subprocess.run([sys.executable, ROOT / "train_scratch.py", *arguments], check=True, capture_output=True)
        return json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    out, seeds = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "1,2"
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in map(int, seeds.split(",")):
        for name, settings in EXERCISES.items():
            if not any((row["name"], row["seed"]) == (name, seed) for row in done):
                row = run({**settings, "seed": seed})
                done.append({"name": name, "seed": seed, "bpb": row["val_bpb"], "nelbo": row["val_nelbo"], "stderr": row["val_stderr"],
                             "minutes": row["elapsed_s"] / 60})
                with out.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    print("| constant | bits/byte | seeds |\n| --- | --- | --- |")
    for name in EXERCISES:
        values = [row["bpb"] for row in done if row["name"] == name]
        if values:
            print(f"| {name} | {sum(values) / len(values):.3f} | {', '.join(f'{v:.3f}' for v in values)} |")
