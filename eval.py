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
import difflib
import functools
import json
import logging
import math
import os
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import override
from data.chat import open_dataset
from data.checkpoints import find_checkpoint, write_atomically
from data.loader import TokenDataset
from data.prepare import prepare
from diffusion import log_likelihood, nelbo
from sampler import Sampler, default_checkpoint

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
estimator = "dealt"         # dealt, stratified, llada: how the hidden tokens are chosen, see diffusion.py
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
dtype = "auto"              # of the weights: float32, bfloat16; auto: as stored
threads = 0                 # CPU threads; 0: torch's choice
defaults = {name: value for name, value in globals().items() if type(value) in (int, float, bool, str) and not name.startswith("_")}
settings = override(globals()) if __name__ == "__main__" else defaults
settings["checkpoint"] = checkpoint = settings["checkpoint"] or default_checkpoint()


# ---- the model, asked by requests ----------------------------------------------------------------------------------------------
class Evaluator:
    """What lm-eval wants of a model. All ranks get all requests and divide the forward passes, so that what shares a pass, and with it
    every number, is the same for any number of processes."""

    def __init__(self, **arguments):
        """arguments: the settings above by name."""
        for name in arguments:
            if name not in defaults:
                raise ValueError(f"no setting called {name!r}; did you mean {difflib.get_close_matches(name, defaults, 1, 0)[0]!r}?")
        self.settings = s = {**defaults, **arguments}
        s["cache"] = "" if s["cache"] == "none" else s["cache"]
        self.num_samples = check(s)
        where, self.process, self.processes = common.init_process(s["device"], s["threads"])
        s["batch_size"] = s["batch_size"] or (2048 if where.type == "cpu" else 16384)
        dtype = None if s["dtype"] == "auto" else getattr(torch, s["dtype"])
        self.sampler = Sampler.load(s["checkpoint"], where, dtype, s["adapter"] or None)
        self.model, self.max_len = self.sampler.model.eval(), self.sampler.config.max_len
        self.passes, self.tokens, self.notes, self.answers = 0, 0, {}, []
        self.model.register_forward_hook(self._count)

    def _count(self, _, arguments, __):
        self.passes, self.tokens = self.passes + 1, self.tokens + arguments[0].numel()

    def share(self, function, work):
        """list(map(function, work)), every process doing its part of it."""
        work = list(work)
        mine = [function(item) for item in tqdm(work[self.process::self.processes], disable=bool(self.process) or None, delay=2, unit="pass")]
        if self.processes == 1:
            return mine
        everything = [None] * len(work)
        for process, part in enumerate(common.gather(mine)):
            everything[process::self.processes] = part
        return everything

    def note(self, what):
        """Count something that went not quite as asked; refuse it if strict."""
        if self.settings["strict"]:
            raise ValueError(f"{what} (without --strict it is counted)")
        self.notes[what] = self.notes.get(what, 0) + 1

    # ---------------------------------------------------------------- text -> tokens

    def tok_encode(self, text, add_special_tokens=None, **_):
        """Control tokens count where they are spelled, as in `transformers`; but no text may spell the mask."""
        tokenizer, head = self.sampler.tokenizer, self.sampler.head
        tokens = tokenizer.encode(text, parse_special=True)
        tokens = tokenizer.encode(text) if self.sampler.mask_id in tokens else tokens
        return tokens if add_special_tokens is False or tokens[:len(head)] == head else head + tokens

    def tokens_of(self, context, answer):
        """(prefix, target) by lm-eval's rule: spaces at the end of the context belong to the answer, and what they are together is split."""
        spaces = len(context) - len(context.rstrip())
        context, answer = context[:len(context) - spaces], context[len(context) - spaces:] + answer
        prefix = self.tok_encode(context) if context else self.start
        target = self.tok_encode(context + answer)[len(prefix):] if context else self.tok_encode(answer, add_special_tokens=False)
        if not target:
            self.note("an answer is empty, which is certain: log p = 0")
        if len(target) > self.max_len - len(self.start):
            raise ValueError(f"an answer of {len(target)} tokens does not fit into the model's context of {self.max_len}: {answer[:60]!r}...")
        return self.cut(prefix, len(target)), target

    def cut(self, prefix, room):
        """The end of the prefix, if prefix and `room` tokens are more than the model can see."""
        if len(prefix) + room <= self.max_len:
            return prefix
        self.note(f"a request is longer than the model's context of {self.max_len} tokens and lost its beginning")
        return prefix[len(prefix) + room - self.max_len:]

    @property
    def start(self):
        """What stands before an empty context: what the tokenizer puts before a text, or for models that look one back an end of text."""
        config, s = self.sampler.config, self.sampler
        return s.head or s.start or [config.bos_token_id] * bool(config.shift and config.bos_token_id is not None)

    # ---------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests, disable_tqdm=False):
        """[(log p(answer | context) in nats, whether greedy unmasking writes the answer)]. The second is worked out only where it can
        matter: where a document has one answer. With several they are compared by the first."""
        pairs = [self.tokens_of(*request.args) for request in requests]
        documents = [self.document(request, i) for i, request in enumerate(requests)]
        choices = {}                                                # of each document: its distinct answers
        for document, pair, request in zip(documents, pairs, requests):
            choices.setdefault(document, {})[(tuple(pair[0]), tuple(pair[1]))] = len(request.args[1])
        one = {document: found for document, found in choices.items() if len(found) == 1}
        values = self.score(one) | self.score({document: found for document, found in choices.items() if document not in one})
        single = {i: pair for i, (document, pair) in enumerate(zip(documents, pairs)) if document in one}
        greedy = dict(zip(single, self.greedy(list(single.values()))))
        return [(values[document, tuple(prefix), tuple(target)], greedy.get(i, False))
                for i, (document, (prefix, target)) in enumerate(zip(documents, pairs))]

    @staticmethod
    def document(request, number):
        """(task, document) that a request belongs to; one that does not say so is a document of its own."""
        task, document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
        return task, f"request {number}" if document is None else document

    def score(self, choices):
        """{(document, prefix, target): log p} for choices {document: {(prefix, target): characters}}.

        "auto" gives all 8 passes (32 where nothing is compared) and then 16, 32 and 64 more to answers that are not yet 2 standard errors away from the best, by log p
        or by log p per character (acc and acc_norm), and to that best one. The answers of a document draw the same sets.
        """
        items = [(document, *pair) for document in choices for pair in choices[document]]
        auto, ask = self.num_samples is None, list(range(len(items)))
        value, variance, count = torch.zeros(3, len(items), dtype=torch.float64)
        for number, n in enumerate((8, 16, 32, 64) if auto else (self.num_samples,)):
            n = 32 if auto and all(len(pairs) == 1 for pairs in choices.values()) else n
            streams = [zlib.crc32(repr(items[i][0]).encode()) * 8 + number for i in ask]
            new, error = log_likelihood(self.model, [items[i][1] for i in ask], [items[i][2] for i in ask], n, self.settings["seed"],
                                        self.settings["estimator"], self.settings["cfg_scale"], streams, self.settings["batch_size"], self.share)
            ask = torch.tensor(ask, dtype=torch.int64)
            old = torch.where(error == 0, 0, count[ask])            # what is exact replaces all before
            value[ask] = (old * value[ask] + n * new) / (old + n)
            variance[ask] = (old**2 * variance[ask].nan_to_num() + n**2 * error**2) / (old + n) ** 2
            count[ask] = old + n
            ask = self.in_doubt(choices, value, variance)
            if not ask:
                break
        found = {item: value[i].item() for i, item in enumerate(items)}
        self.answers += [{"task": document[0], "document": document[1], "tokens": len(target), "nats": found[document, prefix, target],
                          "stderr": None if variance[i].isnan() else math.sqrt(variance[i]), "samples": int(count[i])} for i, (document, prefix, target) in enumerate(items)]
        return found

    @staticmethod
    def in_doubt(choices, value, variance):
        """The answers, as indices, that more passes may move across the best of their document."""
        doubtful, first = set(), 0
        for pairs in choices.values():
            mine = torch.arange(first, first + len(pairs))
            first += len(pairs)
            for length in (torch.ones(len(pairs)), torch.tensor(list(pairs.values())).clamp(min=1)):
                score, var = value[mine] / length, variance[mine] / length**2
                best = int(score.argmax())
                near = score[best] - score < 2 * (var + var[best]).sqrt()
                near[best] = False
                if near.any():
                    near[best] = True
                    doubtful |= set(mine[near & (var > 0)].tolist())
        return sorted(doubtful)

    def greedy(self, pairs):
        """Whether greedy unmasking, one token a step, writes the target behind the prefix; for each of [(prefix, target)]."""
        def run(batch):
            L = len(pairs[batch[0]][1])
            arguments = self.sampler.arguments(L, {"steps": 0, "block_length": 0, "temperature": 0.0, "remasking": "low_confidence", "cache": "auto",
                                                   "cfg_scale": self.settings["cfg_scale"], "schedule": "", "seed": 0}, chat=True)
            answers = self.sampler.run([list(pairs[i][0]) for i in batch], arguments)
            return [answer[len(pairs[i][0]):] == list(pairs[i][1]) for i, answer in zip(batch, answers)]

        sizes = {i: (len(target), len(prefix)) for i, (prefix, target) in enumerate(pairs) if target}
        batches = self.batches(sizes)
        found = {i: hit for batch, hits in zip(batches, self.share(run, batches)) for i, hit in zip(batch, hits)}
        return [found.get(i, True) for i in range(len(pairs))]

    def batches(self, sizes):
        """Lists of the keys of {key: (tokens to write, tokens of prompt)}: as many to write, batch_size tokens in all."""
        result = []
        for key, (new, _) in sorted(sizes.items(), key=lambda item: item[1], reverse=True):
            room = self.settings["batch_size"] // (new + sizes[result[-1][0]][1]) if result else 0
            if not result or sizes[result[-1][0]][0] != new or len(result[-1]) >= room:
                result.append([])
            result[-1].append(key)
        return result

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[log p(text) in nats], a text in windows of the model's length, as lm-eval cuts it."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        choices = {}
        for number, request in enumerate(requests):
            start = self.start[-1] if self.start else None
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for part, window in enumerate(get_rolling_token_windows(tokens, start, self.max_len - 1, 1)):
                prefix, target = make_disjoint_window(window)
                choices[(*self.document(request, number), part, number)] = {(tuple(t for t in prefix if t is not None), tuple(target)): 1}
        totals = [0.0] * len(requests)
        for (document, *_), value in self.score(choices).items():
            totals[document[-1]] += value
        return totals

    # ---------------------------------------------------------------- generation

    def generate_until(self, requests, disable_tqdm=False):
        """The completions, cut at the first of a task's stop strings."""
        s, groups = self.settings, {}
        for i, request in enumerate(requests):
            wanted = request.args[1]
            temperature = wanted.get("temperature", 0.0) if wanted.get("do_sample") else 0.0
            count = s["max_new_tokens"] or int(wanted.get("max_gen_toks", wanted.get("max_new_tokens", 256)))
            groups.setdefault((count, temperature if s["temperature"] == "auto" else s["temperature"]), []).append(i)
        texts = {}
        for (count, temperature), members in groups.items():
            if count > self.max_len - max(len(self.start), 1):
                raise ValueError(f"{count} tokens to write do not fit into the model's context of {self.max_len}: choose --max_new_tokens=...")
            prompts = {i: self.cut(self.tok_encode(requests[i].args[0]) or self.start, count) for i in members}
            length = min(s["block_length"], count)
            arguments = self.sampler.arguments(count, {**s, "temperature": temperature, "block_length": length}, chat=True)

            def run(batch):
                seeds = [zlib.crc32(repr((s["seed"], i, prompts[i])).encode()) for i in batch]
                answers = self.sampler.run([prompts[i] for i in batch], {**arguments, "seed": seeds})
                return [self.sampler.decode(answer[len(prompts[i]):], chat=s["apply_chat_template"])[0] for i, answer in zip(batch, answers)]

            batches = self.batches({i: (count, len(prompt)) for i, prompt in prompts.items()})
            texts |= {i: text for batch, found in zip(batches, self.share(run, batches)) for i, text in zip(batch, found)}
        return [until(texts[i], request.args[1].get("until") or []) for i, request in enumerate(requests)]

    # ---------------------------------------------------------------- chat

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        self.settings["apply_chat_template"] = True                 # an end of turn then ends an answer
        return self.sampler.tokenizer.render_chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template=False):
        return self.sampler.tokenizer.chat_templates.get("default", "")

    @property
    def tokenizer_name(self):
        return self.settings["checkpoint"].replace("/", "__")

    @property
    def eot_token_id(self):
        return self.sampler.config.eos_token_id


def until(text, stops):
    """The text before the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


def check(s):
    """The number of samples, None for "auto"; ValueError for settings that cannot be."""
    auto = str(s["num_samples"]) == "auto"
    if not auto and not (str(s["num_samples"]).isdecimal() and int(s["num_samples"])):
        raise ValueError(f"num_samples takes a number of at least 1 or auto, got {s['num_samples']!r}")
    if s["dtype"] not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {s['dtype']!r}")
    for name in ("limit", "max_tokens", "seq_len", "max_new_tokens", "batch_size", "seed"):
        if s[name] < 0:
            raise ValueError(f"{name} must not be negative, got {s[name]}")
    return None if auto else int(s["num_samples"])


@functools.cache
def harness_model():
    """The Evaluator as a class of lm-eval's."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import simple_parse_args_string

    class Unmask(Evaluator, TemplateLM):
        def __init__(self, **arguments):
            TemplateLM.__init__(self)
            Evaluator.__init__(self, **arguments)

        @classmethod
        def create_from_arg_obj(cls, arguments, _=None):            # --model_args alone: lm-eval's batch_size counts requests, its device is cuda
            return cls(**arguments)

        @classmethod
        def create_from_arg_string(cls, arguments, _=None):
            return cls(**simple_parse_args_string(arguments))

        def _loglikelihood_tokens(self, requests, **_):             # of lm-eval's own `loglikelihood`, which ours replaces
            raise NotImplementedError
    return Unmask


# ---- the bound on a text -------------------------------------------------------------------------------------------------------
def text_bound(evaluator):
    """(nats per token, its standard error, bytes per token, tokens measured) of the validation split of `dataset`; of conversations the answers."""
    checkpoint_folder = find_checkpoint(checkpoint)
    if not evaluator.process:
        prepare(dataset, checkpoint_folder)
    common.barrier()
    folder = prepare(dataset, checkpoint_folder)
    length = min(seq_len or 1024, evaluator.max_len, len(TokenDataset(folder).val))
    data = open_dataset(dataset, folder, length, padding="hidden")
    batch = data.val_batch(max(1, max_tokens // length)).to(next(evaluator.model.parameters()).device)
    value, error = nelbo(evaluator.model, batch.tokens, evaluator.num_samples or 1, seed, maskable=batch.maskable, attention_mask=batch.attention_mask,
                         map=evaluator.share)
    count = batch.tokens.numel() if batch.maskable is None else int(batch.maskable.sum())
    return value, error, data.val_bytes_per_token(batch, evaluator.sampler.tokenizer), count


# ---- lm-eval's tasks -----------------------------------------------------------------------------------------------------------
def load_tasks(names):
    """(what lm-eval's `simple_evaluate` takes as tasks, its TaskManager). ValueError for unknown names and data that is not here."""
    from lm_eval.tasks import TaskManager
    if include_path and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path {include_path} is no folder: it takes one with .yaml files of lm-eval's tasks")
    manager = TaskManager(include_path=include_path or None, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):      # reading lm-eval's 14,000 takes ten seconds: only if need be
        manager = TaskManager(include_path=include_path or None)
    loaded = {}
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, ["nelbo", *manager.all_tasks], 3, 0.5)
            raise ValueError(f"no task called {name!r}" + f"; did you mean {' or '.join(near)}?" * bool(near) + " (lm-eval's `lm_eval ls tasks` lists all)")
        for task in manager.match_tasks([name]):
            try:
                loaded[task] = manager.load([task])
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                raise ValueError(f"the data of task {task} cannot be loaded ({type(error).__name__}: {error}). Off-line, run it once where there is a "
                                 f"network, with --limit=1, and copy ~/.cache/huggingface (or $HF_HOME) here") from None
    for name, task in ((name, task) for part in loaded.values() for name, task in part["tasks"].items()):
        if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
            raise ValueError(f"task {name} runs what the model writes: add --confirm_run_unsafe_code if this machine may be harmed")
    return [item for task, part in loaded.items() for item in ([part["groups"][task]] if task in part["groups"] else part["tasks"].values())], manager


def run_tasks(evaluator, names):
    """lm-eval's results, with our settings and passes, on rank 0; elsewhere None."""
    from lm_eval.evaluator import simple_evaluate
    items, manager = load_tasks(names)
    results = simple_evaluate(evaluator, tasks=items, task_manager=manager, num_fewshot=None if num_fewshot < 0 else num_fewshot,
                              limit=(int(limit) if limit >= 1 else limit) or None, apply_chat_template=apply_chat_template,
                              confirm_run_unsafe_code=confirm_run_unsafe_code, log_samples=False)
    for task in results["results"] if results else ():              # beside lm-eval's error, of which documents, that of the sets
        errors = [answer["stderr"] for answer in evaluator.answers if answer["task"] == task and answer["stderr"] is not None]
        if errors:
            results["results"][task]["nats_error,none"] = sum(errors) / len(errors)
    return results


def main():
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("tasks is empty: choose lm-eval's names, or nelbo")
    if output and (not output.endswith(".json") or not os.access(Path(output).absolute().parent, os.W_OK)):
        raise OSError(f"cannot write results to {output}: --output takes the name of a .json file in a folder that exists and can be written to")
    evaluator = (Evaluator if names == ["nelbo"] else harness_model())(**settings)
    results, bound = {}, None
    if "nelbo" in names:
        bound = value, error, size, count = text_bound(evaluator)
    if rest := [name for name in names if name != "nelbo"]:
        results = run_tasks(evaluator, rest)
    passes, tokens = map(sum, zip(*common.gather((evaluator.passes, evaluator.tokens))))
    if evaluator.processes > 1:
        dist.destroy_process_group()
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
        kind = "exact" if evaluator.sampler.config.causal else "upper bound"
        print(f"\n| data | tokens | nats/token | +- | bits/byte | perplexity | +- | {kind} |\n|---|---|---|---|---|---|---|---|")
        print(f"| {dataset} | {count:,} | {value:.4f} | {error:.4f} | {bits:.4f} | {math.exp(value):.2f} | {math.exp(value) * error:.2f} | |\n")
        results["nelbo"] = {"dataset": dataset, "tokens": count, "nats_per_token": value, "stderr": error, "bits_per_byte": bits}
    if output:
        from lm_eval.utils import handle_non_serializable
        results["unmask"] = {"settings": settings, "passes": passes, "tokens": tokens, "notes": evaluator.notes, "answers": evaluator.answers}
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_atomically(output, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    if bound:
        print(f"val nelbo {value:.4f} +- {error:.4f} nats/token, {bits:.3f} bits/byte")


if __name__ == "__main__":
    for _chatty in ("lm_eval", "huggingface_hub"):
        logging.getLogger(_chatty).setLevel(logging.ERROR)
    main()
else:                                                               # `import eval` is how lm-eval learns of --model unmask
    from lm_eval.api.registry import register_model
    register_model("unmask")(harness_model())
