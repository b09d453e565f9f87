"""A checkpoint that answers lm-evaluation-harness: log-likelihoods, rolling perplexity, generation,
chat.

harness.py makes it a model of lm-eval's. Its requests are called what lm-eval calls them. `target`
is the text whose probability is asked for, `prefix` what stands before it, both as tokens.
"""
import itertools
import math
import zlib
from dataclasses import dataclass

import common
import kernels
from diffusion import REMASKING
from evaluation.likelihood import ESTIMATORS, log_likelihood
from sampling.sampler import Sampler

# Unmasking without chance, the surest token first.
GREEDY = {"steps": 0, "block_length": 0, "temperature": 0.0, "remasking": "low_confidence",
          "cache": "auto", "schedule": "", "seed": 0}


@dataclass(eq=False)
class Answer:
    """One of the answers of a document, and what is known of its probability."""
    document: tuple         # (task, number)
    prefix: tuple
    target: tuple
    characters: int         # of the target's text
    value: float = 0.0      # log p(target | prefix) in nats
    variance: float = 0.0   # of `value`; nan: not known
    samples: int = 0

    def add(self, value, error, samples):
        """Average with another estimate, weighted by samples. What is exact replaces all before."""
        before = 0 if error == 0 else self.samples
        total = before + samples
        variance = 0.0 if math.isnan(self.variance) else self.variance
        self.value = (before * self.value + samples * value) / total
        self.variance = (before**2 * variance + samples**2 * error**2) / total**2
        self.samples = total

    def record(self):
        """What --output keeps of it."""
        task, number, *_ = self.document
        stderr = None if math.isnan(self.variance) else math.sqrt(self.variance)
        return {"task": task, "document": number, "tokens": len(self.target), "nats": self.value,
                "stderr": stderr, "samples": self.samples}


class Evaluator:
    """What lm-eval wants of a model. All processes get all requests and divide the forward passes,
    so that what shares a pass, and with it every number, is the same for any number of
    processes."""

    def __init__(self, settings):
        """settings: the constants of eval.py, by name. Raises ValueError, FileNotFoundError."""
        self.settings = dict(settings)
        self.num_samples = check(settings)
        # lm-eval's own classes have a `rank`, by which it would divide the documents.
        device, self.process, _ = common.init_process(settings["device"], settings["threads"])
        dtype = common.weights_dtype(device, settings["dtype"])
        self.sampler = Sampler.load(settings["checkpoint"], device, dtype, settings["adapter"])
        self.model, self.max_len = self.sampler.model.eval(), self.sampler.config.max_len
        self.passes, self.tokens = 0, 0     # that the model has seen
        self.notes = {}                     # what went not quite as asked: how often
        for line in self.sampler.without_effect(settings):
            self.note(line)
        self.answers = []                   # records of all that was scored
        # Every pass, for logits or for a loss, begins with the embedding.
        self.model.embed.register_forward_hook(self.count_pass)

    def count_pass(self, module, arguments, result):
        self.passes += 1
        self.tokens += arguments[0].numel()

    def note(self, what):
        """Count something that went not quite as asked; ValueError if strict."""
        if self.settings["strict"]:
            raise ValueError(f"{what} (without --strict it is counted)")
        self.notes[what] = self.notes.get(what, 0) + 1

    # ------------------------------------------------------------------------ text -> tokens

    def tok_encode(self, text, add_special_tokens=None, **_):
        """Control tokens count where they are spelled, as in `transformers`; but no text may spell
        the mask."""
        head = self.sampler.head
        tokens = self.sampler.tokenizer.encode(text, parse_special=True, parse_mask=False)
        if add_special_tokens is False or tokens[:len(head)] == head:
            return tokens
        return head + tokens

    @property
    def opening(self):
        """What stands before an empty context: what the tokenizer puts before a text or, for models
        that look one token back, BOS."""
        config = self.sampler.config
        if self.sampler.head or self.sampler.opening:
            return self.sampler.head or self.sampler.opening
        if config.shift and config.bos_token_id is not None:
            return [config.bos_token_id]
        return []

    def tokens_of(self, context, answer):
        """(prefix, target) by lm-eval's rule: spaces at the end of the context belong to the
        answer, and what they are together is split."""
        stripped = context.rstrip()
        answer = context[len(stripped):] + answer
        if stripped:
            prefix = self.tok_encode(stripped)
            target = self.tok_encode(stripped + answer)[len(prefix):]
        else:
            prefix = self.opening
            target = self.tok_encode(answer, add_special_tokens=False)
        if len(target) > self.max_len - len(self.opening):
            raise ValueError(f"an answer of {len(target)} tokens does not fit into the model's "
                             f"context of {self.max_len}: {answer[:60]!r}...")
        return self.cut(prefix, len(target)), target

    def some_tokens_of(self, context, answer):
        """`tokens_of`; but an answer that its rule leaves no token, because one token spans the end
        of the context and the answer ("half a wo", "rd"), has those that it has by itself. Else it
        would be certain, and the best of all answers."""
        prefix, target = self.tokens_of(context, answer)
        if target:
            return prefix, target
        target = self.tok_encode(answer, add_special_tokens=False)
        if not target:
            self.note("an answer is empty, which is certain: log p = 0")
            return prefix, target
        self.note("an answer is part of its context's last token and was encoded by itself")
        return self.cut(prefix, len(target)), target

    def cut(self, prefix, room):
        """The end of the prefix, if prefix and `room` tokens are more than the model can see."""
        if len(prefix) + room <= self.max_len:
            return prefix
        self.note(f"a request is longer than the model's context of {self.max_len} tokens and lost "
                  "its beginning")
        return prefix[len(prefix) + room - self.max_len:]

    # ------------------------------------------------------------------------ log-likelihoods

    def loglikelihood(self, requests, disable_tqdm=False):
        """[(log p(answer | context) in nats, whether greedy unmasking writes the answer)]. The
        second is worked out only where it can matter: where a document has one answer. With several
        they are compared by the first."""
        pairs, documents, choices = [], [], {}
        for i, request in enumerate(requests):
            context, answer = request.args
            prefix, target = self.some_tokens_of(context, answer)
            pairs.append((tuple(prefix), tuple(target)))
            documents.append(document_of(request, i))
            choices.setdefault(documents[i], {})[pairs[i]] = len(answer)
        single = {name: found for name, found in choices.items() if len(found) == 1}
        several = {name: found for name, found in choices.items() if len(found) > 1}
        values = self.score(single) | self.score(several)
        alone = [i for i, document in enumerate(documents) if document in single]
        written = dict(zip(alone, self.greedy([pairs[i] for i in alone])))
        return [(values[(document, *pair)], written.get(i, False))
                for i, (document, pair) in enumerate(zip(documents, pairs))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[log p(text) in nats], a text in windows of the model's length, as lm-eval cuts it."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        first = self.opening[-1] if self.opening else None
        choices = {}
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, first, self.max_len - 1, 1)
            for part, window in enumerate(windows):
                prefix, target = make_disjoint_window(window)
                prefix = tuple(token for token in prefix if token is not None)
                document = (*document_of(request, number), part, number)
                choices[document] = {(prefix, tuple(target)): 1}
        totals = [0.0] * len(requests)
        for (document, _, _), value in self.score(choices).items():
            totals[document[-1]] += value
        return totals

    def score(self, choices):
        """{(document, prefix, target): log p} for choices {document: {(prefix, target):
        characters}}.

        With num_samples "auto" all answers get 8 passes (32 where nothing is compared); then those
        that may yet turn out the best of their document get 16, 32 and 64 more. The answers of a
        document draw the same sets of hidden tokens.
        """
        answers = []
        for document, pairs in choices.items():
            for (prefix, target), characters in pairs.items():
                answers.append(Answer(document, prefix, target, characters))
        rounds = [32]
        if self.num_samples is not None:
            rounds = [self.num_samples]
        elif len(answers) > len(choices):               # some document has several
            rounds = [8, 16, 32, 64]
        asked = answers
        for number, samples in enumerate(rounds):
            if asked:
                self.estimate(asked, samples, number)
                asked = in_doubt(answers)
        self.answers += [answer.record() for answer in answers]
        return {(a.document, a.prefix, a.target): a.value for a in answers}

    def estimate(self, answers, samples, number):
        """The round `number` of passes for these answers."""
        s = self.settings
        streams = [zlib.crc32(repr(a.document).encode()) * 8 + number for a in answers]
        values, errors = log_likelihood(
            self.model, [a.prefix for a in answers], [a.target for a in answers], samples,
            s["seed"], s["estimator"], s["cfg_scale"], streams, s["batch_size"], common.share)
        for answer, value, error in zip(answers, values.tolist(), errors.tolist()):
            answer.add(value, error, samples)

    def greedy(self, pairs):
        """Whether greedy unmasking, one token a step, writes the target after the prefix; for each
        of [(prefix, target)]."""
        def write(batch):
            count = len(pairs[batch[0]][1])             # of all in the batch
            how = {**GREEDY, "cfg_scale": self.settings["cfg_scale"]}
            arguments = self.sampler.arguments(count, how, chat=True)
            rows = self.sampler.run([list(pairs[i][0]) for i in batch], arguments)
            return [row == [*pairs[i][0], *pairs[i][1]] for i, row in zip(batch, rows)]

        sizes = {}
        for i, (prefix, target) in enumerate(pairs):
            if target:
                sizes[i] = len(target), len(prefix)
        found = self.run_batches(write, sizes)
        return [found.get(i, True) for i in range(len(pairs))]

    # ------------------------------------------------------------------------ generation

    def generate_until(self, requests, disable_tqdm=False):
        """The completions, cut at the first of a task's stop strings."""
        groups = {}                                     # requests that are written in the same way
        for i, request in enumerate(requests):
            groups.setdefault(self.how_to_write(request.args[1]), []).append(i)
        texts = {}
        for (count, temperature), members in groups.items():
            texts |= self.write(requests, members, count, temperature)
        return [texts[i] for i in range(len(requests))]

    def how_to_write(self, wanted):
        """(new tokens, temperature) for what a task wants, unless our settings say otherwise."""
        count, temperature = self.settings["max_new_tokens"], self.settings["temperature"]
        if not count:
            count = int(wanted.get("max_gen_toks", wanted.get("max_new_tokens", 256)))
        if temperature == "auto":
            temperature = wanted.get("temperature", 0.0) if wanted.get("do_sample") else 0.0
        return count, temperature

    def write(self, requests, members, count, temperature):
        """{i: completion} of requests[i], i in `members`."""
        if count > self.max_len - max(len(self.opening), 1):
            raise ValueError(f"{count} tokens to write do not fit into the model's context of "
                             f"{self.max_len}: choose --max_new_tokens=...")
        prompts = {}
        for i in members:
            prompts[i] = self.cut(self.tok_encode(requests[i].args[0]) or self.opening, count)
        s = {**self.settings, "temperature": temperature,
             "block_length": min(self.settings["block_length"], count)}
        arguments = self.sampler.arguments(count, s, chat=True)

        def run(batch):
            seeds = [zlib.crc32(repr((s["seed"], i, prompts[i])).encode()) for i in batch]
            rows = self.sampler.run([prompts[i] for i in batch], {**arguments, "seed": seeds})
            texts = []
            for i, row in zip(batch, rows):
                stops = requests[i].args[1].get("until")
                texts.append(self.text_until(row[len(prompts[i]):], stops))
            return texts

        sizes = {i: (count, len(prompt)) for i, prompt in prompts.items()}
        return self.run_batches(run, sizes)

    def run_batches(self, run, sizes):
        """{key: its result} for sizes {key: (tokens to write, tokens of prompt)}; run(list of keys)
        gives their results. The processes share the batches."""
        found, batches = {}, self.batches(sizes)
        with kernels.packed(self.model):                # once, and not for each batch
            for batch, results in zip(batches, common.share(run, batches)):
                found.update(zip(batch, results))
        return found

    def batches(self, sizes):
        """Lists of keys with as many tokens to write, batch_size tokens in all."""
        batches, last_new, room = [], None, 0
        largest_first = sorted(sizes.items(), key=lambda item: item[1], reverse=True)
        for key, (new, prompt) in largest_first:
            if new != last_new or len(batches[-1]) >= room:
                batches.append([])
                last_new, room = new, self.settings["batch_size"] // (new + prompt)
            batches[-1].append(key)
        return batches

    def text_until(self, tokens, stops):
        """The text of an answer before the first stop string, which may spell special tokens."""
        if isinstance(stops, str):
            stops = [stops]
        stops = stops or []
        in_chat = self.settings["apply_chat_template"]
        text, used, _ = self.sampler.decode(tokens, chat=in_chat)
        text, _ = self.sampler.cut_at_special(tokens[:used + 1], text, stops)
        return until(text, stops)

    # ------------------------------------------------------------------------ chat

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The text of a conversation. Without a generation prompt the last message is how the
        answer begins (a task's gen_prefix): the model goes on after it, so what closes its turn is
        left out, as in `transformers`."""
        self.settings["apply_chat_template"] = True     # an end of turn then ends an answer
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


def document_of(request, number):
    """(task, document) that a request belongs to; one that does not say so is a document of its
    own."""
    task, document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
    return task, f"request {number}" if document is None else document


def in_doubt(answers):
    """Those of the answers, sorted by document, whose rank in their document is not yet certain: by
    log p (lm-eval's acc) or by log p per character (acc_norm)."""
    doubtful = set()
    for _, group in itertools.groupby(answers, key=lambda answer: answer.document):
        group = list(group)
        doubtful.update(close_to_best(group, [1] * len(group)))
        doubtful.update(close_to_best(group, [max(a.characters, 1) for a in group]))
    return [answer for answer in answers if answer in doubtful]


def close_to_best(answers, lengths):
    """The answers less than 2 standard errors from the best, by value / length, and the best if
    there are any; without those that are known exactly."""
    scores = [answer.value / length for answer, length in zip(answers, lengths)]
    variances = [answer.variance / length**2 for answer, length in zip(answers, lengths)]
    best, close = scores.index(max(scores)), []
    for i, answer in enumerate(answers):
        error = math.sqrt(variances[best] + variances[i])
        if i != best and scores[best] - scores[i] < 2 * error:
            close.append(answer)
    if close:
        close.append(answers[best])
    return [answer for answer in close if answer.variance > 0]


def until(text, stops):
    """The text before the first of the stop strings."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text


def check(settings):
    """The number of samples, None for "auto". Raises ValueError for settings that cannot be."""
    lowest = {"limit": 0, "max_tokens": 1, "seq_len": 0, "max_new_tokens": 0, "batch_size": 1,
              "seed": 0}
    for name, low in lowest.items():
        if not low <= settings[name] < 2**32:
            raise ValueError(f"{name} must be between {low} and 2**32 - 1, got {settings[name]}")
    for name, choices in {"estimator": ESTIMATORS, "remasking": REMASKING}.items():
        if settings[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got "
                             f"{settings[name]!r}")
    number = str(settings["num_samples"])               # lm-eval's --model_args makes it an int
    if number == "auto":
        return None
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"num_samples takes a number of at least 1 or auto, got {number!r}")
    return int(number)
