"""A checkpoint that answers lm-evaluation-harness: log-likelihoods, rolling perplexity, generation, chat.

harness.py makes it a model of lm-eval's.
"""
import math
import zlib

import torch

import common
from diffusion import REMASKING, log_likelihood
from evaluation.designs import ESTIMATORS
from sampling.sampler import Sampler


class Evaluator:
    """What lm-eval wants of a model. All ranks get all requests and divide the forward passes, so that what shares a pass, and with it
    every number, is the same for any number of processes."""

    def __init__(self, settings):
        """settings: the constants of eval.py, by name."""
        self.settings = s = dict(settings)
        s["cache"] = "" if s["cache"] == "none" else s["cache"]
        self.num_samples = check(s)
        where, self.process, self.processes = common.init_process(s["device"], s["threads"])
        s["batch_size"] = s["batch_size"] or (2048 if where.type == "cpu" else 16384)
        self.sampler = Sampler.load(s["checkpoint"], where, common.weights_dtype(where, s["dtype"]), s["adapter"] or None)
        self.model, self.max_len = self.sampler.model.eval(), self.sampler.config.max_len
        self.passes, self.tokens, self.notes, self.answers = 0, 0, {}, []
        self.model.register_forward_hook(self._count)

    def _count(self, _, arguments, __):
        self.passes, self.tokens = self.passes + 1, self.tokens + arguments[0].numel()

    def note(self, what):
        """Count something that went not quite as asked; refuse it if strict."""
        if self.settings["strict"]:
            raise ValueError(f"{what} (without --strict it is counted)")
        self.notes[what] = self.notes.get(what, 0) + 1

    # ---------------------------------------------------------------- text -> tokens

    def tok_encode(self, text, add_special_tokens=None, **_):
        """Control tokens count where they are spelled, as in `transformers`; but no text may spell the mask."""
        head = self.sampler.head
        tokens = self.sampler.tokenizer.encode(text, parse_special=True, parse_mask=False)
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
                                        self.settings["estimator"], self.settings["cfg_scale"], streams, self.settings["batch_size"], common.share)
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
        found = {i: hit for batch, hits in zip(batches, common.share(run, batches)) for i, hit in zip(batch, hits)}
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
                return [self.text_until(answer[len(prompts[i]):], requests[i].args[1].get("until"))
                        for i, answer in zip(batch, answers)]

            batches = self.batches({i: (count, len(prompt)) for i, prompt in prompts.items()})
            texts |= {i: text for batch, found in zip(batches, common.share(run, batches)) for i, text in zip(batch, found)}
        return [texts[i] for i in range(len(requests))]

    def text_until(self, tokens, stops):
        """The text of an answer before the first stop string, which may spell special tokens."""
        stops = [stops] if isinstance(stops, str) else stops or []
        text, used, _ = self.sampler.decode(tokens, chat=self.settings["apply_chat_template"])
        text, _ = self.sampler.cut_at_special(tokens[:used + 1], text, stops)
        return until(text, stops)

    # ---------------------------------------------------------------- chat

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The text of a conversation. Without a generation prompt the last message is how the
        answer begins (a task's gen_prefix): the model goes on behind it, so what closes its turn is
        left out, as in `transformers`."""
        self.settings["apply_chat_template"] = True                 # an end of turn then ends an answer
        text = self.sampler.tokenizer.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        if begun not in text:
            raise ValueError("the chat template does not write how the answer should begin: "
                             f"{begun[:60]!r}")
        return text[:text.rindex(begun) + len(begun)]

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
    for name, low in (("limit", 0), ("max_tokens", 1), ("seq_len", 0), ("max_new_tokens", 0), ("batch_size", 0), ("seed", 0)):
        if not low <= s[name] < 2**32:
            raise ValueError(f"{name} must be between {low} and 2**32 - 1, got {s[name]}")
    for name, choices in (("estimator", ESTIMATORS), ("remasking", REMASKING)):
        if s[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {s[name]!r}")
    return None if auto else int(s["num_samples"])
