"""Benchmarks of lm-evaluation-harness and the bound on a text, with error bars, for every
checkpoint that sample.py takes.

A masked diffusion model knows no log p(answer), only an average over sets of hidden tokens (LLaDA,
arXiv 2502.09992, eq. 6); evaluation/likelihood.py asks for it many texts at a time and says how far
off it may be. Autoregressive models get it exactly.

    python eval.py                                      NELBO of out/scratch on tales
    python eval.py --dataset=notes.txt --checkpoint=answerdotai/ModernBERT-base
    python eval.py --include_path=evaluation/tasks --tasks=stdlib_choice,stdlib_cloze,stdlib_text
    python eval.py --tasks=arc_challenge,piqa --checkpoint=GSAI-ML/LLaDA-8B-Base --cfg_scale=0.5
    torchrun --nproc_per_node=8 eval.py --tasks=gsm8k ...           the same table, sooner

lm-eval's own command line:
    python -c 'import eval; from lm_eval.__main__ import cli_evaluate as run; run()' \\
        run --model unmask --model_args checkpoint=out/scratch --tasks piqa
"""
import common  # noqa: I001 (before torch: it sets how threads wait)
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from data.chat import is_chat, open_dataset
from data.loader import TokenDataset
from data.prepare import prepare
from diffusion import nelbo
from edit_tokens import edit_block
from evaluation.editing import bound_of_blocks, bound_of_edits, texts_to_write
from evaluation.evaluator import Evaluator
from evaluation.harness import harness_model, run_tasks
from pretrained.hub import tokenizer_folder
from sampling.sampler import default_checkpoint

# ---- settings: change them here or with --name=value ---------------------------------------------
checkpoint = default_checkpoint()   # out/scratch, or else checkpoints/tales; a folder or hub id
adapter = ""                # a folder with a LoRA adapter to add to it
# what to measure
tasks = "nelbo"             # lm-eval's tasks or groups, with commas; nelbo: the bound on `dataset`
dataset = "tales"           # nelbo: a data set as the recipes take it, or a text file or folder
max_tokens = 2**18          # nelbo: so many tokens of its validation split at most
seq_len = 0         # nelbo: tokens of a window; 0: the model's context (published models: 1024)
limit = 0.0                 # first so many documents of each task, below 1 a share of them; 0: all
num_fewshot = -1            # examples before each question; -1: the task's own
include_path = ""           # a folder with tasks of your own (.yaml), as evaluation/tasks
apply_chat_template = False     # put questions into the checkpoint's chat format
output = ""                 # write results, settings and every answer's error to this .json
strict = False              # refuse what does not fit, and empty answers, instead of counting them
confirm_run_unsafe_code = False     # allow tasks that run what the model writes
# log-likelihoods
num_samples = "auto"    # passes an answer; auto: 8, up to 120 in doubt (nelbo: 1, single ones: 32)
estimator = "dealt"         # which tokens are hidden: dealt, stratified, llada; see likelihood.py
device = "cuda" if torch.cuda.is_available() else "cpu"     # or mps
_on_gpu = common.given("device", device) != "cpu"
batch_size = 16384 if _on_gpu else 2048     # tokens of a pass, which many requests share
# generation: the sampler, as in sample.py
max_new_tokens = 0          # 0: what the task says, 256 if it says nothing
steps = 0                   # denoising steps in total; 0: one a token
block_length = 0    # tokens denoised together, left to right; 0: all (block diffusion: its own)
temperature = "auto"        # auto: what the task says, or 0
top_p = 1.0                 # draw from the most probable tokens that together exceed this; 1: all
remasking = "low_confidence"    # what is kept: low_confidence, random, entropy, margin, ancestral
alg_temp = 0.0              # Dream's: draw what to keep from softmax(score / alg_temp); 0: the best
threshold = 0.0    # keep all predictions of at least this probability a step; 0: off, LLaDA2: 0.95
edit_threshold = -1.0   # with it, write anew where another token exceeds it; below 0: the model's
factor = 0.0                # Fast-dLLM's factor rule instead; 0: off
entropy_bound = 0.0         # EB-Sampler's: keep as many as this bound (0.1 nats) allows; 0: off
suppress = ""               # tokens never to write: ids, names, eos or eot, with commas
defer = ""                  # tokens to write last, likewise
cache = "auto"      # none, prefix, dual (approximate), block (exact; auto: for block diffusion)
cfg_scale = 0.0             # classifier-free guidance, of log-likelihoods too; 0: none
schedule = ""               # tokens a step: even or timesteps; empty: the model's own
seed = 1337                 # of the sets of hidden tokens and of sampling
# machine
dtype = "auto"      # of the weights: float32, bfloat16; auto: as stored, where that is fast here
threads = 0                 # CPU threads; 0: torch's choice
settings = common.override(globals(), read=__name__ == "__main__")


# ---- the bound on a text -------------------------------------------------------------------------
@dataclass
class Bound:
    """What is known of a text."""
    value: float            # nats per token
    error: float            # its standard error
    bytes_per_token: float
    tokens: int             # that were measured

    @property
    def bits_per_byte(self):
        return self.value / math.log(2) / self.bytes_per_token


def text_bound(evaluator):
    """The Bound of the validation split of `dataset`; of conversations the answers count.

    It is the figure of a recipe's last line, from the same windows (train_scratch.py's seq_len and
    final_eval_tokens are our seq_len and max_tokens) and the same masks, in the precision in which
    the weights are stored.
    """
    folder = common.first_on_rank_0(prepare, dataset, tokenizer_folder(checkpoint))
    sampler, corpus = evaluator.sampler, TokenDataset(folder)
    config, largest = sampler.config, int(corpus.val.max())
    if largest >= config.vocab_size:
        raise ValueError(f"{dataset} holds token {largest}, and {checkpoint} has "
                         f"{config.vocab_size} tokens: conversations need a checkpoint with a chat "
                         "template; take such a one, or a text")
    longest = edit_block(config)        # of a model that edits by tokens; else all of its context
    if config.edits:
        longest = config.max_len // 2   # on its way a text may be as long as both its ends
    length = seq_len
    if not length:
        length = longest if config.family == "unmask" else 1024
    length = min(length, longest)
    if config.edits or config.edit_masks and not is_chat(dataset):
        return bound_of_texts(evaluator, corpus, length)
    length = min(length, len(corpus.val))
    data = open_dataset(dataset, folder, length, padding="hidden")
    batch = data.val_batch(max(2, max_tokens // length))        # one alone would have no error
    if limit:
        batch = data.val_batch(limited(len(batch.tokens)))
    batch = batch.to(next(evaluator.model.parameters()).device)
    value, error = nelbo(
        evaluator.model, batch.tokens, evaluator.num_samples or 1, seed, maskable=batch.maskable,
        attention_mask=batch.attention_mask, run_passes=common.share)
    tokens = batch.tokens.numel() if batch.maskable is None else int(batch.maskable.sum())
    if config.causal and batch.maskable is None:
        tokens -= len(batch.tokens)                     # the first of a window is given
    return Bound(value, error, data.val_bytes_per_token(batch, sampler.tokenizer), tokens)


def bound_of_texts(evaluator, corpus, length):
    """The Bound of a model that edits, on whole texts of the validation split, cut to `length`."""
    sampler = evaluator.sampler
    texts = texts_to_write(sampler, corpus, length, max_tokens)
    texts = texts[:limited(len(texts))]
    if sampler.config.edits:
        value, error = bound_of_edits(sampler, texts, seed)
    else:
        end, samples = sampler.tokenizer.eos_token_id, evaluator.num_samples or 1
        value, error = bound_of_blocks(evaluator.model, texts, length, end, seed, samples)
    return Bound(value, error, corpus.bytes_per_token("val"), sum(map(len, texts)))


def limited(number):
    """How many of so many windows, texts or conversations `limit` leaves: two at least."""
    if limit >= 1:
        number = min(number, int(limit))
    elif limit:
        number = math.ceil(number * limit)
    return max(2, number)


# ---- what is printed and written -----------------------------------------------------------------
def print_results(results, bound, evaluator, passes, tokens):
    if results:
        from lm_eval.utils import make_table
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
    for note, times in evaluator.notes.items():
        print(f"{times} x: {note}")
    print(f"{passes:,} forward passes, {tokens:,} tokens")
    if bound:
        kind = "exact" if evaluator.sampler.config.causal else "upper bounds"
        perplexity = math.exp(bound.value)
        print("\n| data | tokens | nats/token | +- | bits/byte | perplexity | +- | these are |\n"
              "|---|---|---|---|---|---|---|---|\n"
              f"| {dataset} | {bound.tokens:,} | {bound.value:.4f} | {bound.error:.4f} | "
              f"{bound.bits_per_byte:.4f} | {perplexity:.2f} | {perplexity * bound.error:.2f} | "
              f"{kind} |\n")


def write_results(results, bound, evaluator, passes, tokens):
    """lm-eval's results as it has them, and ours, to the file `output`. Raises OSError."""
    as_text = None
    if results:                         # lm-eval's hold more than JSON has
        from lm_eval.utils import handle_non_serializable as as_text
    if bound:
        stderr = None if math.isnan(bound.error) else bound.error       # NaN is no JSON
        results["nelbo"] = {
            "dataset": dataset, "tokens": bound.tokens, "nats_per_token": bound.value,
            "stderr": stderr, "bits_per_byte": bound.bits_per_byte}
    results["unmask"] = {"settings": settings, "passes": passes, "tokens": tokens,
                         "notes": evaluator.notes, "answers": evaluator.answers}
    text = json.dumps(results, indent=2, default=as_text, ensure_ascii=False)
    common.write_atomically(output, lambda name: Path(name).write_text(text, encoding="utf-8"))


# ---- run -----------------------------------------------------------------------------------------
def main():
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("tasks is empty: choose lm-eval's names, or nelbo")
    folder = Path(output).absolute().parent
    if output and (not output.endswith(".json") or not os.access(folder, os.W_OK)):
        raise OSError(f"cannot write results to {output}: --output takes the name of a .json file "
                      "in a folder that exists and can be written to")
    benchmarks = [name for name in names if name != "nelbo"]
    if "nelbo" in names and cfg_scale:
        raise ValueError("cfg_scale is for tasks: the bound on a text has no prompt to guide it")
    if benchmarks:
        evaluator = harness_model(settings)()
    else:
        evaluator = Evaluator(settings)
        common.note_without_effect("the bound on a text", num_fewshot=False,
                                   apply_chat_template=False, estimator=False)
    noise = evaluator.sampler.config.noise
    if benchmarks and noise != "mask":
        raise ValueError(f"{checkpoint} undoes {noise} noise: its bound can be measured, with "
                         "--tasks=nelbo, and no other task")
    results, bound = {}, None
    if "nelbo" in names:
        bound = text_bound(evaluator)
    if benchmarks:
        results = run_tasks(evaluator, benchmarks, settings)
    passes = sum(common.gather(evaluator.passes))
    tokens = sum(common.gather(evaluator.tokens))
    common.end_process()
    if evaluator.process != 0:
        return
    print_results(results, bound, evaluator, passes, tokens)
    if output:
        write_results(results, bound, evaluator, passes, tokens)
    if bound:
        print(f"val nelbo {bound.value:.4f} +- {bound.error:.4f} nats/token, "
              f"{bound.bits_per_byte:.3f} bits/byte")


if __name__ == "__main__":
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # off-line it would tell of every attempt
    main()
else:                                   # `import eval` is how lm-eval learns of --model unmask
    from lm_eval.api.registry import register_model
    register_model("unmask")(harness_model(settings))
