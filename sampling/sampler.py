"""A checkpoint that can be asked: text -> tokens with masks -> text, and a record of every step on the way.

sample.py (terminal, chat, trace) and server.py (web page, OpenAI's API) are two faces of `Sampler`; the mathematics is in diffusion.py.
"""
import functools
import json
import math
import os
import re
import time
from pathlib import Path

import torch

from data.checkpoints import find_checkpoint, tokenizer_folder, write_atomically
from data.tokenizer import Tokenizer
from diffusion import REMASKING, generate, infill
from model import Transformer
from scale.lora import load_adapter, merge_lora

OFF = {"threshold": 0.0, "factor": 0.0, "entropy_bound": 0.0, "top_p": 1.0, "top_k": 0, "alg_temp": 0.0, "remask": 0.0, "remask_schedule": "cap",
       "suppress": "", "defer": ""}                                 # the settings of rules that are not used
GAP = re.compile(r"\[MASK(?::(\d+))?\]")                            # [MASK], or [MASK:12] for twelve tokens


def default_checkpoint():
    """out/scratch, where train_scratch.py writes; before that is there, the diffusion model that comes with the repository."""
    trained = Path("out/scratch")
    return str(trained) if (trained / "config.json").is_file() else os.path.relpath(Path(__file__).parent.with_name("checkpoints") / "mdlm")


class Sampler:
    """Attributes: `model`, `config` (the model's), `tokenizer`, `name` (of the checkpoint), `mask_id`."""

    def __init__(self, model, tokenizer, name="unmask"):
        """Raises ValueError for a bidirectional model when neither its config nor its tokenizer knows a mask token."""
        self.model, self.config, self.tokenizer, self.name = model, model.config, tokenizer, name
        for role in ("mask_token_id", "eos_token_id", "bos_token_id"):      # a config may leave them to the tokenizer (BERT, Dream)
            found = getattr(tokenizer, role)
            if getattr(self.config, role) is None and found is not None and found < self.config.vocab_size:
                setattr(self.config, role, found)
        if self.config.mask_token_id is None and not self.config.causal:
            raise ValueError(f"neither the config nor the tokenizer of {name} has a mask token: convert it first (convert_bert.py, convert_ar.py)")
        self.mask_id = self.config.vocab_size if self.config.causal else self.config.mask_token_id      # as diffusion.generate writes masks
        # What the checkpoint puts around a text: [CLS] ... [SEP], BOS, or nothing.
        self.head, self.tail = tokenizer.frame()
        # An autoregressive model needs a first token to continue.
        self.start = [token for token in (self.config.bos_token_id, self.config.eos_token_id) if token is not None and self.config.causal][:1]
        # Most tokenizers glue a space to the word behind it: a gap takes the space before it along.
        self.glues_space = tokenizer.encode(" the")[:1] != tokenizer.encode(" ")
        self.ends = {*self.config.ends, tokenizer.eos_token_id} - {None}
        self._decode = functools.lru_cache(2**16)(lambda ids: tokenizer.decode(ids))

    @classmethod
    def load(cls, checkpoint, device="cpu", dtype=None, adapter=None):
        """The Sampler of a folder or hub id; an adapter without tokenizer takes its base's.

        adapter: the folder of a LoRA adapter to add to the weights, ours or PEFT's.
        """
        if str(checkpoint).startswith("out/") and not Path(checkpoint).is_dir():
            raise FileNotFoundError(f"there is no {checkpoint} yet: run python train_scratch.py first, or choose another with --checkpoint=...")
        folder = find_checkpoint(checkpoint)
        model = Transformer.from_pretrained(folder, device=device, dtype=dtype)
        if adapter:
            model = merge_lora(load_adapter(model, adapter))
        tokenizer = Tokenizer.from_pretrained(tokenizer_folder(folder))
        return cls(model, tokenizer, str(checkpoint).rstrip("/"))

    # ---------------------------------------------------------------- text -> tokens

    def encode_prompt(self, text):
        """The tokens to continue. The mask's spelling, [MASK] too, is text; but [MASK:12], which is
        ours and means a gap, is a ValueError that says where it stands."""
        gap = next((gap for gap in GAP.finditer(text) if gap[1]), None)
        if gap:
            raise ValueError(f"the prompt contains {gap[0]} at character {gap.start()}: use infill to fill it")
        return self.head + self.tokenizer.encode(text) or list(self.start)

    def encode_gaps(self, text):
        """The tokens of a text in which [MASK] stands for a token to fill in and [MASK:12] for twelve."""
        tokens, position = list(self.head), 0
        for gap in GAP.finditer(text):
            count = int(gap[1] or 1)
            if not 1 <= count <= self.config.max_len:
                raise ValueError(f"{gap[0]} asks for {count} tokens: between 1 and the context of {self.config.max_len} are possible")
            before = text[position:gap.start()]
            tokens += self.tokenizer.encode(before.removesuffix(" ") if self.glues_space else before) + [self.mask_id] * count
            position = gap.end()
        if not position:
            raise ValueError("there is nothing to fill: write [MASK], or [MASK:12] for twelve tokens, where text is missing")
        return tokens + self.tokenizer.encode(text[position:]) + self.tail

    def encode_chat(self, messages):
        """The tokens of a conversation, [{"role": "user", "content": "..."}, ...], in the checkpoint's own format."""
        return self.tokenizer.apply_chat_template(messages)

    @functools.cached_property
    def end_of_turn(self):
        """The special token that the chat template writes behind an answer (<|im_end|>, <|eot_id|>), in a set; empty if there is none."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        after = self.tokenizer.render_chat(messages, add_generation_prompt=False).rpartition("answer")[2]
        first = self.tokenizer.encode(after, parse_special=True, parse_mask=False)[:1]
        known = self.tokenizer.backend.get_added_tokens_decoder()
        return {token for token in first if token in known and known[token].special}

    # ---------------------------------------------------------------- tokens -> text

    def decode(self, tokens, chat=False):
        """(text, tokens used, whether an end was reached) of a completion: up to the first end of text or, in a chat, of a turn."""
        ends = self.ends | self.end_of_turn if chat else self.ends
        used = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return self.tokenizer.decode(tokens[:used], skip_special_tokens=True), used, used < len(tokens)

    @functools.cached_property
    def special_tokens(self):
        """{spelling: id} of the special tokens, which `decode` leaves out of the text."""
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def cut_at_special(self, tokens, text, stops):
        """(the text before the first stop string that spells special tokens, whether there is one).

        stops: list of str, <|im_end|> or a mixture as <|im_end|>user; plain ones are for the caller
        to find. text: what the tokens say without special tokens. Each special token that a stop
        spells gets a character that no text contains, a lone surrogate. It stands in the text where
        the token stood, and in the stop for its spelling, so that one is found in the other.
        """
        marks = {}                                              # spelling -> its character
        for spelling in sorted(self.special_tokens, key=len, reverse=True):     # the longest match
            if any(spelling in stop for stop in stops):
                marks[spelling] = chr(0xD800 + len(marks))
        if not marks:
            return text, False
        by_id = {self.special_tokens[spelling]: mark for spelling, mark in marks.items()}
        spelled = re.compile("|".join(map(re.escape, marks)))
        wanted = [spelled.sub(lambda found: marks[found[0]], stop)
                  for stop in stops if spelled.search(stop)]
        marked, done, last = "", 0, -1
        for i, token in enumerate(tokens):
            if token in by_id:
                if last < 0 or last < i - 1:  # else no text stands between the two
                    before = self.tokenizer.decode(tokens[:i], skip_special_tokens=True)
                    position = min(max(done, len(before)), len(text))
                    marked, done = marked + text[done:position], position
                marked, last = marked + by_id[token], i
        marked += text[done:]
        cut = min((at for stop in wanted if (at := marked.find(stop)) >= 0), default=-1)
        if cut < 0:
            return text, False
        return "".join(c for c in marked[:cut] if c not in marks.values()), True

    def split(self, tokens):
        """The texts in a row of tokens, which ends of text separate."""
        texts, start = [], 0
        for i in [i for i, token in enumerate(tokens) if token in self.ends] + [len(tokens)]:
            texts.append(self.tokenizer.decode(tokens[start:i], skip_special_tokens=True))
            start = i + 1
        return texts

    def pieces(self, tokens):
        """The text that each token adds where it stands, None for masks: list of str, which joined are the text.

        A token's text depends on its left neighbour (WordPiece's spaces), and a character may take several tokens (bytes): the
        last of them gets it.
        """
        result, before, pending = [], (), ()
        for token in tokens:
            if token == self.mask_id:
                result.append(None)
                before = pending = ()
                continue
            pending += (token,)
            left, both = self._decode(before), self._decode(before + pending)
            piece = both[len(left):] if both.startswith(left) else self._decode(pending)
            if piece.endswith("\ufffd") and len(pending) < 4:       # perhaps the beginning of a character
                result.append("")
                continue
            result.append(piece)
            before, pending = pending, ()
        return result

    # ---------------------------------------------------------------- the settings of a run

    def arguments(self, count, settings, gaps=False, chat=False):
        """The keyword arguments of diffusion.generate, or infill if `gaps`, for `count` new tokens.

        settings: steps, block_length, temperature, remasking, cache, cfg_scale, schedule, seed and those in OFF, as sample.py's
        constants have them; 0, "" and "auto" leave the choice to us, and this is the choice.
        """
        s, ours = {**OFF, **settings}, self.config.family == "unmask" and not chat
        if s["temperature"] == "auto":
            temperature = 0.7 if ours else 0.0                      # small models repeat themselves when greedy
        else:
            try:
                temperature = float(s["temperature"])
            except ValueError:
                raise ValueError(f"temperature takes a number or auto, got {s['temperature']!r}") from None
        remasking, cache = s["remasking"], s["cache"]
        if remasking == "auto":
            asks = any(s[rule] for rule in ("threshold", "factor", "entropy_bound", "alg_temp", "defer"))       # needs a rule that asks the model
            remasking = "ancestral" if s["remask"] else "random" if ours and not asks else "low_confidence"
        if cache == "auto":
            cache = "block" if self.config.block_length and not self.config.causal else None        # exact, so why not
        chosen = {"steps": s["steps"] or count,                     # one token a step
                  "block_length": s["block_length"] or (None if gaps else count),                   # all at once
                  "temperature": temperature, "remasking": remasking, "cache": cache or None, "cfg_scale": s["cfg_scale"],
                  "schedule": s["schedule"] or None, "seed": s["seed"], "remask": s["remask"], "remask_schedule": s["remask_schedule"],
                  "top_p": None if s["top_p"] == 1 else s["top_p"],
                  **{name: s[name] or None for name in ("threshold", "factor", "entropy_bound", "top_k", "alg_temp")},
                  **{name: self.named_tokens(name, s[name]) for name in ("suppress", "defer")}}
        return chosen if gaps else {"max_new_tokens": count, **chosen}

    def named_tokens(self, setting, text):
        """The ids, a tuple, of tokens in a comma-separated text: ids, names such as <|im_end|>, eos (ends of text) or eot (of a turn)."""
        tokens, vocabulary = set(), self.tokenizer.backend
        for name in filter(None, (part.strip() for part in text.split(","))):
            if name in ("eos", "eot"):
                tokens |= self.ends if name == "eos" else self.end_of_turn
            elif (token := int(name) if name.isascii() and name.isdigit() and len(name) < 10 else vocabulary.token_to_id(name)) is not None:
                tokens.add(token)
            else:
                raise ValueError(f"{setting} takes ids or names of tokens, eos or eot, separated by commas, got {name!r}")
        return tuple(sorted(tokens))

    def fit(self, prompt, max_new_tokens, most=128):
        """How many tokens to generate behind a prompt: what was asked for, or if that is 0 what fits, `most` at most."""
        room = self.config.max_len - len(prompt)
        if room < max(max_new_tokens, 1):
            raise ValueError(f"{len(prompt)} tokens of prompt and {max(max_new_tokens, 1)} new ones exceed the context of {self.config.max_len}")
        return max_new_tokens or min(most, room)

    def run(self, sequences, arguments, gaps=False, on_step=None):
        """diffusion.generate, or infill if `gaps`."""
        return (infill if gaps else generate)(self.model, sequences, on_step=on_step, **arguments)


# ------------------------------------------------------------------------------------------------------------------------------


class Trace:
    """`on_step` of a run: what each step changed, as text. The terminal draws `rows`; a web page plays the `messages`.

    rows      for each sequence a list of [text, confidence, step], text None for a mask, step 0 for what was given
    messages  {"rows": ...} at the beginning, {"step": n, "changes": [[row, position, text, confidence], ...], "lengths": [...]} for each
              step, {"pieces": [[text, ...], ...]} at the end, when every token knows its neighbours
    """

    def __init__(self, sampler, remasking="low_confidence", watch=None):
        """watch(trace, message): called with each message."""
        self.sampler, self.remasking, self.watch = sampler, remasking, watch
        self.rows, self.messages, self.canvas, self.passes, self.start = [], [], None, 0, time.perf_counter()

    def __call__(self, step):
        self.passes = step.number
        if self.canvas is None:                                     # what stood there before the first step
            before = torch.where(step.revealed, self.sampler.mask_id, step.tokens)
            self.canvas = [row[:n] for row, n in zip(before.tolist(), step.lengths.tolist())]
            self.rows = [[[text, None, 0] for text in self.sampler.pieces(row)] for row in self.canvas]
            self._tell({"rows": [[text for text, _, _ in row] for row in self.rows]})
        changes = []
        for b, (tokens, length) in enumerate(zip(step.tokens.tolist(), step.lengths.tolist())):
            changed = [i for i in range(length) if tokens[i] != self.canvas[b][i]]
            pieces = self.sampler.pieces(tokens[:length]) if changed else []
            for i in changed:
                confidence = self._confidence(step.confidence[b, i].item()) if pieces[i] is not None else None
                self.rows[b][i] = [pieces[i], confidence, step.number]
                changes.append([b, i, pieces[i], confidence])
            self.canvas[b], self.rows[b] = tokens[:length], self.rows[b][:length]
        self._tell({"step": step.number, "changes": changes, "lengths": [len(row) for row in self.canvas]})

    def finish(self):
        """Correct the text of tokens that were written before their neighbours. Returns self."""
        pieces = [self.sampler.pieces(row) for row in self.canvas or []]
        for row, texts in zip(self.rows, pieces):
            for cell, text in zip(row, texts):
                cell[0] = text
        self._tell({"pieces": pieces})
        return self

    def report(self, new_tokens):
        """The speed of the run, one line."""
        seconds = time.perf_counter() - self.start
        return (f"{new_tokens} tokens in {self.passes} forward passes ({new_tokens / max(self.passes, 1):.2f} tokens a pass), {seconds:.2f} s, "
                f"{new_tokens / max(seconds, 1e-9):.1f} tokens/s")

    def write_html(self, path, arguments):
        """The run as one self-contained page: page.html with the messages, and the `arguments` of the run, in it."""
        settings = {name: value for name, value in arguments.items() if value not in (None, "", [], ())}
        data = json.dumps({"title": self.sampler.name, "settings": settings, "messages": self.messages}).replace("<", "\\u003c")
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        page = page.replace("/*TRACE*/ null", data)                 # in which no text can end the script element
        write_atomically(path, lambda temporary: Path(temporary).write_text(page, encoding="utf-8"))

    def _confidence(self, score):
        """A probability to colour by, or None: entropy's score is -H, and rules that choose blindly have none."""
        if REMASKING.get(self.remasking) is None and score == 0:
            return None
        return round(math.exp(score) if score < 0 or self.remasking == "entropy" else score, 4)

    def _tell(self, message):
        self.messages.append(message)
        if self.watch:
            self.watch(self, message)
