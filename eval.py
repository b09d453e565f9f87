"""Benchmarks of lm-evaluation-harness and the bound on a text, with error bars, for every checkpoint that sample.py takes.

A masked diffusion model knows no log p(answer), only an average over sets of hidden tokens (LLaDA, arXiv 2502.09992, eq. 6);
diffusion.log_likelihood asks for it many texts at a time and says how far off it may be. Autoregressive models get it exactly.

    python eval.py                                                                  NELBO of out/scratch on pydocs
    python eval.py --tasks=nelbo --dataset=notes.txt --checkpoint=answerdotai/ModernBERT-base
    python eval.py --include_path=tests/tasks --tasks=stdlib_choice,stdlib_cloze,stdlib_text
    python eval.py --tasks=arc_challenge,piqa --checkpoint=GSAI-ML/LLaDA-8B-Base --cfg_scale=0.5 --output=llada.json
    torchrun --nproc_per_node=8 eval.py --tasks=gsm8k ...                           the same table, sooner

lm-eval's own command line:
    python -c 'import eval; from lm_eval.__main__ import cli_evaluate as run; run()' run --model unmask --model_args checkpoint=out/scratch --tasks piqa
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import json
import logging
import math
import os
from pathlib import Path

from common import override
from data.chat import open_dataset
from data.checkpoints import tokenizer_folder, write_atomically
from data.loader import TokenDataset
from data.prepare import prepare
from diffusion import nelbo
from evaluation.evaluator import Evaluator
from evaluation.harness import harness_model, run_tasks
from sampling.sampler import default_checkpoint

# ---- settings: change them here or with --name=value ---------------------------------------------------------------------------
checkpoint = ""             # a recipe's folder, a published checkpoint's folder or its hub id; nothing: out/scratch or, untrained, checkpoints/mdlm
adapter = ""                # a folder with a LoRA adapter to add to it
# what to measure
tasks = "nelbo"             # names of lm-eval's tasks and groups, with commas; nelbo: the bound on `dataset`
dataset = "pydocs"          # nelbo: a data set as the recipes take it, or a text file or folder; its validation split is measured
max_tokens = 2**18          # nelbo: so many tokens of it at most
seq_len = 0                 # nelbo: tokens of a window; 0: the model's context, 1024 at most
limit = 0.0                 # first so many documents of each task, below 1 a share of them; 0: all
num_fewshot = -1            # examples before each question; -1: the task's own
include_path = ""           # a folder with tasks of your own (.yaml), as tests/tasks
apply_chat_template = False # put questions into the checkpoint's chat format
output = ""                 # write the results to this .json, as lm-eval has them, with our settings, passes and errors of every answer
strict = False              # refuse what does not fit into the context, and empty answers, instead of cutting and counting them
confirm_run_unsafe_code = False     # allow tasks that run what the model writes
# log-likelihoods
num_samples = "auto"        # forward passes of an answer; auto: 8, where its rank is in doubt up to 120 (nelbo: 1, single answers: 32)
estimator = "dealt"         # dealt, stratified, llada: how the hidden tokens are chosen, see evaluation/designs.py
batch_size = 0              # tokens of a pass, which many requests share; 0: 2048 on a CPU, 16384 elsewhere
# generation: the sampler, as in sample.py
max_new_tokens = 0          # 0: what the task says, 256 if it says nothing
steps = 0                   # denoising steps in total; 0: one a token
block_length = 0            # tokens denoised together; 0: all (block diffusion: the model's own)
temperature = "auto"        # auto: what the task says, or 0
top_p = 1.0                 # draw from the most probable tokens that together exceed this; 1: from all
remasking = "low_confidence"    # what is kept: low_confidence, random, entropy, margin, ancestral
alg_temp = 0.0              # Dream's: draw the positions to keep from softmax(score / alg_temp); 0: keep the best
threshold = 0.0             # keep every prediction with at least this probability instead of a fixed number a step; 0: off
factor = 0.0                # Fast-dLLM's factor rule instead; 0: off
entropy_bound = 0.0         # EB-Sampler's rule instead; 0: off
suppress = ""               # tokens never to write: ids, names, eos or eot, separated by commas
defer = ""                  # tokens to write last, likewise
cache = "auto"              # none, prefix, dual (approximate), block (exact); auto: block for block diffusion, else none
cfg_scale = 0.0             # classifier-free guidance, of generation and of log-likelihoods; 0: none
schedule = ""               # tokens a step: even or timesteps; empty: the family's own
seed = 1337                 # of the sets of hidden tokens and of sampling
# machine
device = "auto"             # auto, cpu, cuda, mps
dtype = "auto"              # of the weights: float32, bfloat16; auto: as stored, on a CPU without bfloat16 instructions float32
threads = 0                 # CPU threads; 0: torch's choice
settings = override(globals(), read=__name__ == "__main__")
settings["checkpoint"] = checkpoint = settings["checkpoint"] or default_checkpoint()


# ---- the bound on a text -------------------------------------------------------------------------------------------------------
def text_bound(evaluator):
    """(nats per token, its standard error, bytes per token, tokens measured) of the validation split of `dataset`; of conversations the answers."""
    folder = common.first_on_rank_0(prepare, dataset, tokenizer_folder(checkpoint))
    length = min(seq_len or 1024, evaluator.max_len, len(TokenDataset(folder).val))
    data = open_dataset(dataset, folder, length, padding="hidden")
    batch = data.val_batch(max(1, max_tokens // length)).to(next(evaluator.model.parameters()).device)
    value, error = nelbo(evaluator.model, batch.tokens, evaluator.num_samples or 1, seed, maskable=batch.maskable, attention_mask=batch.attention_mask,
                         map=common.share)
    count = batch.tokens.numel() if batch.maskable is None else int(batch.maskable.sum())
    return value, error, data.val_bytes_per_token(batch, evaluator.sampler.tokenizer), count


# ---- run ------------------------------------------------------------------------------------------------------------------------
def main():
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("tasks is empty: choose lm-eval's names, or nelbo")
    if output and (not output.endswith(".json") or not os.access(Path(output).absolute().parent, os.W_OK)):
        raise OSError(f"cannot write results to {output}: --output takes the name of a .json file in a folder that exists and can be written to")
    evaluator = Evaluator(settings) if names == ["nelbo"] else harness_model(settings)()
    results, bound = {}, None
    if "nelbo" in names:
        bound = value, error, size, count = text_bound(evaluator)
    if rest := [name for name in names if name != "nelbo"]:
        results = run_tasks(evaluator, rest, settings)
    passes, tokens = map(sum, zip(*common.gather((evaluator.passes, evaluator.tokens))))
    common.end_process()
    if evaluator.process:
        return
    if rest:
        from lm_eval.utils import make_table
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
    for note, times in evaluator.notes.items():
        print(f"{times} x: {note}")
    print(f"{passes:,} forward passes, {tokens:,} tokens")
    if bound:
        bits = value / math.log(2) / size
        kind = "exact" if evaluator.sampler.config.causal else "upper bounds"
        print("\n| data | tokens | nats/token | +- | bits/byte | perplexity | +- | these are |\n|---|---|---|---|---|---|---|---|")
        print(f"| {dataset} | {count:,} | {value:.4f} | {error:.4f} | {bits:.4f} | {math.exp(value):.2f} | {math.exp(value) * error:.2f} | {kind} |\n")
        results["nelbo"] = {"dataset": dataset, "tokens": count, "nats_per_token": value, "stderr": error, "bits_per_byte": bits}
    if output:
        from lm_eval.utils import handle_non_serializable
        results["unmask"] = {"settings": settings, "passes": passes, "tokens": tokens, "notes": evaluator.notes, "answers": evaluator.answers}
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_atomically(output, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    if bound:
        print(f"val nelbo {value:.4f} +- {error:.4f} nats/token, {bits:.3f} bits/byte")


if __name__ == "__main__":
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")              # off-line it would tell of every attempt, and we tell of the last
    main()
else:                                                               # `import eval` is how lm-eval learns of --model unmask
    from lm_eval.api.registry import register_model
    register_model("unmask")(harness_model(settings))
