"""A checkpoint that can be asked: text -> tokens with masks -> text.

sample.py, the chat, the server and eval.py all ask through `Sampler`. How tokens are chosen stands
in engine.py; trace.py records what happens on the way.
"""
import functools
import os
import re
from pathlib import Path

import torch

import kernels
from data import sudoku
from data.tokenizer import Tokenizer
from model import Transformer
from noises import reverse
from passes import canvas_mask_id, own_block_length
from pretrained.hub import find_checkpoint, tokenizer_folder
from sampling.engine import ADAPTIVE, Step, generate, infill
from sampling.int8 import load_int8
from training.lora import load_adapter, merge_lora

GAP = re.compile(r"\[MASK(?::(\d+))?\]")        # [MASK], or [MASK:12] for twelve tokens

# Sampler settings that a caller of `Sampler.arguments` may leave out, as they are when not in use.
NOT_USED = {"threshold": 0.0, "edit_threshold": -1.0, "factor": 0.0, "entropy_bound": 0.0,
            "top_p": 1.0, "top_k": 0, "alg_temp": 0.0, "remask": 0.0, "remask_schedule": "cap",
            "suppress": "", "defer": ""}
# Settings of models that fill masks, as they are when nobody has touched them.
FOR_MASKS = {**NOT_USED, "block_length": 0, "remasking": "auto", "cache": "auto", "cfg_scale": 0.0}
# Those of NOT_USED that ask for a rule by which predictions are kept.
OTHER_RULES = ("threshold", "factor", "entropy_bound", "alg_temp", "defer")
CACHES = ("auto", "none", "prefix", "dual", "block")


def refuse_for_masks(settings, unused, instead):
    """ValueError for the first setting of models that fill masks that is not as `unused` has it;
    instead: what this model does and takes."""
    for name, value in unused.items():
        given = settings.get(name, value)
        if given != value and not (name == "cache" and given in ("none", "")):
            raise ValueError(f"{name} is for models that fill masks; {instead}")


def default_checkpoint():
    """out/scratch, where train_scratch.py writes; until that is there, the diffusion model that
    comes with the repository."""
    if Path("out/scratch/config.json").is_file():
        return "out/scratch"
    return os.path.relpath(Path(__file__).parent.parent / "checkpoints" / "tales")


class Sampler:
    """Attributes: `model`, `config` (the model's), `tokenizer`, `name` (of the checkpoint),
    `mask_id`, and

    head, tail  lists of ids that the checkpoint puts around a text ([CLS] and [SEP], BOS); often
                empty
    opening     list of one id: what stands before a text that has no beginning given, in an
                autoregressive model and in our own family, trained on one text after the other;
                else empty
    ends        set of ids that end a text
    edits       whether it inserts and deletes (train_edits.py): sampling/editing.py asks it then
    has_noise   whether it undoes other noise than masks (noises.py): then the mask says where a
                text is to be written
    grid        the Shape of the grids that it writes (data/sudoku.py); None: it writes texts
    """

    def __init__(self, model, tokenizer, name="unmask"):
        """Raises ValueError for a bidirectional model when neither its config nor its tokenizer
        knows a mask token."""
        self.model, self.config, self.tokenizer, self.name = model, model.config, tokenizer, name
        self.take_roles_from_tokenizer()
        if self.config.mask_token_id is None and not (self.config.causal or self.config.edits):
            raise ValueError(f"neither the config nor the tokenizer of {name} has a mask token: "
                             "convert it first (convert_bert.py, convert_ar.py)")
        self.has_noise = self.config.noise != "mask"
        self.mask_id = self.config.mask_token_id
        if not (self.config.edits or self.has_noise):
            self.mask_id = canvas_mask_id(model)
        self.head, self.tail = tokenizer.frame()
        self.opening = []
        if self.config.causal or self.config.family == "unmask":
            roles = [self.config.bos_token_id, self.config.eos_token_id]
            self.opening = [token for token in roles if token is not None][:1]
        self.ends = {*self.config.ends, tokenizer.eos_token_id} - {None}
        self.edits = self.config.edits or self.config.delete_token_id is not None
        self.grid = sudoku.grid_shape(tokenizer)
        self.glues_space = False
        if self.grid is None:
            # Most tokenizers glue a space to the word after it: a gap takes the space before it
            # along.
            self.glues_space = tokenizer.encode(" the")[:1] != tokenizer.encode(" ")
        self.decode_some = functools.lru_cache(2**16)(tokenizer.decode)

    def take_roles_from_tokenizer(self):
        """Fill in the special tokens that a config leaves to its tokenizer (BERT, Dream)."""
        for role in ("mask_token_id", "eos_token_id", "bos_token_id"):
            token = getattr(self.tokenizer, role)
            missing = getattr(self.config, role) is None
            if missing and token is not None and token < self.config.vocab_size:
                setattr(self.config, role, token)

    @classmethod
    def load(cls, checkpoint, device="cpu", dtype=None, adapter=None, weights="full"):
        """The Sampler of a folder or hub id; an adapter without tokenizer takes its base's.

        adapter: the folder of a LoRA adapter to add to the weights, ours or PEFT's. weights: "full"
        or "int8", see int8.py. Raises FileNotFoundError or ValueError.
        """
        if str(checkpoint).startswith("out/") and not Path(checkpoint).exists():
            raise FileNotFoundError(f"there is no {checkpoint} yet: run python train_scratch.py "
                                    "first, or choose another with --checkpoint=...")
        folder = find_checkpoint(checkpoint)
        if weights == "int8" and adapter:
            raise ValueError("an adapter cannot be added to 8-bit weights: merge it into its base "
                             "first (finetune_llada.py --merge)")
        is_adapter = (folder / "adapter_config.json").exists()
        if is_adapter and adapter and Path(adapter).expanduser().resolve() == folder.resolve():
            raise ValueError(f"{adapter} is an adapter and stands for its base with it: it would "
                             "be added twice; leave --adapter away")
        if weights == "int8":
            model = load_int8(folder, device, dtype)
        else:
            model = Transformer.from_pretrained(folder, device=device, dtype=dtype)
        if adapter:
            model = merge_lora(load_adapter(model, adapter))
        tokenizer = Tokenizer.from_pretrained(tokenizer_folder(folder))
        return cls(model, tokenizer, str(checkpoint).rstrip("/"))

    # ------------------------------------------------------------------------ text -> tokens

    def encode_prompt(self, text):
        """The tokens to continue. The mask's spelling, [MASK] too, is text; but [MASK:12], which is
        ours and means a gap, is a ValueError that says where it stands."""
        for gap in GAP.finditer(text):
            if gap[1]:
                raise ValueError(f"the prompt contains {gap[0]} at character {gap.start()}: use "
                                 "infill to fill it")
        if self.grid is not None:
            text = "".join(c for c in text if c not in sudoku.SEPARATORS)
        return self.head + self.tokenizer.encode(text) or list(self.opening)

    def has_gaps(self, text):
        """Whether a text is for `encode_gaps`; what a model of grids is given is a puzzle."""
        if self.grid is not None:
            return bool(text.strip())
        return GAP.search(text) is not None

    def encode_gaps(self, text):
        """The tokens of a text in which [MASK] stands for a token to fill in and [MASK:12] for
        twelve; for a model of grids, of a puzzle. Raises ValueError where there is no gap, or one
        that is too long, or for what is no puzzle."""
        if self.grid is not None:
            return self.encode_puzzle(text)
        tokens, position = list(self.head), 0
        for gap in GAP.finditer(text):
            count = int(gap[1] or 1)
            if not 1 <= count <= self.config.max_len:
                raise ValueError(f"{gap[0]} asks for {count} tokens: between 1 and the context of "
                                 f"{self.config.max_len} are possible")
            before = text[position:gap.start()]
            if self.glues_space:
                before = before.removesuffix(" ")
            tokens += self.tokenizer.encode(before)
            tokens += [self.mask_id] * count
            position = gap.end()
        if not position:
            raise ValueError("there is nothing to fill: write [MASK], or [MASK:12] for twelve "
                             "tokens, where text is missing")
        return tokens + self.tokenizer.encode(text[position:]) + self.tail

    def encode_puzzle(self, text):
        """The tokens of a puzzle, a mask for each empty cell."""
        tokens = []
        for digit in sudoku.parse_puzzle(text, self.grid):
            tokens += self.tokenizer.encode(str(digit)) if digit else [self.mask_id]
        return tokens

    def encode_chat(self, messages):
        """The tokens of a conversation, [{"role": "user", "content": "..."}, ...], in the
        checkpoint's own format. Raises ValueError for a model of grids."""
        if self.grid is not None:
            raise ValueError(f"{self.name} writes grids, it cannot chat")
        return self.tokenizer.apply_chat_template(messages)

    @functools.cached_property
    def end_of_turn(self):
        """The special token that the chat template writes after an answer (<|im_end|>,
        <|eot_id|>), in a set; empty if there is none."""
        messages = [{"role": "user", "content": "question"},
                    {"role": "assistant", "content": "answer"}]
        whole = self.tokenizer.render_chat(messages, add_generation_prompt=False)
        after = whole.rpartition("answer")[2]
        first = self.tokenizer.encode(after, parse_special=True, parse_mask=False)[:1]
        return set(first) & set(self.special_tokens.values())

    # ------------------------------------------------------------------------ tokens -> text

    def decode(self, tokens, chat=False):
        """(text, tokens used, whether an end was reached) of a completion: up to the first end of
        text or, in a chat, of a turn."""
        ends = self.ends | self.end_of_turn if chat else self.ends
        used = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = self.tokenizer.decode(tokens[:used], skip_special_tokens=True)
        return text, used, used < len(tokens)

    def continued(self, before, tokens, text):
        """`text`, what `tokens` say, as it is after the tokens `before`.

        WordPiece (BERT) and Llama's tokenizers write the space before a word unless it is the
        first, and WordPiece "##" unless it is not.
        """
        alone = self.tokenizer.decode(tokens[:1], skip_special_tokens=True)
        left = self.tokenizer.decode(before, skip_special_tokens=True)
        both = self.tokenizer.decode(before + tokens[:1], skip_special_tokens=True)
        if not (left and alone and both.startswith(left) and text.startswith(alone)):
            return text
        return both[len(left):] + text[len(alone):]

    def verdict(self, tokens):
        """What to say of a grid that is written, one line."""
        return sudoku.verdict([int(piece or 0) for piece in self.pieces(tokens)])

    def split(self, tokens):
        """The texts in a row of tokens, which ends of text separate."""
        texts, begin = [], 0
        for i, token in enumerate(tokens):
            if token in self.ends:
                texts.append(self.tokenizer.decode(tokens[begin:i], skip_special_tokens=True))
                begin = i + 1
        texts.append(self.tokenizer.decode(tokens[begin:], skip_special_tokens=True))
        return texts

    def pieces(self, tokens):
        """The text that each token adds where it stands, None for masks: list of str, which joined
        are the text.

        A token's text depends on its left neighbour (WordPiece's spaces), and a character may take
        several tokens (bytes): the last of them gets it.
        """
        result, before, pending = [], (), ()
        for token in tokens:
            if token == self.mask_id:
                result.append(None)
                before = pending = ()
                continue
            pending += (token,)
            left, both = self.decode_some(before), self.decode_some(before + pending)
            piece = self.decode_some(pending)
            if both.startswith(left):
                piece = both[len(left):]
            if piece.endswith("\ufffd") and len(pending) < 4:   # perhaps a character's beginning
                result.append("")
                continue
            result.append(piece)
            before, pending = pending, ()
        return result

    # ------------------------------------------------------------------------ stop strings

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
        spelled = re.compile("|".join(map(re.escape, marks)))
        marked, places = self.mark_special(tokens, text, marks), []
        for stop in stops:
            marked_stop = spelled.sub(lambda found: marks[found[0]], stop)
            if marked_stop != stop and marked_stop in marked:
                places.append(marked.index(marked_stop))
        if not places:
            return text, False
        before = marked[:min(places)]
        return "".join(c for c in before if c not in marks.values()), True

    def mark_special(self, tokens, text, marks):
        """The text with the characters `marks`, {spelling: character}, where those special tokens
        stood."""
        by_id = {self.special_tokens[spelling]: mark for spelling, mark in marks.items()}
        marked, done, last = "", 0, -2
        for i, token in enumerate(tokens):
            if token not in by_id:
                continue
            if last < i - 1:                            # else no text stands between the two
                before = self.tokenizer.decode(tokens[:i], skip_special_tokens=True)
                position = min(max(done, len(before)), len(text))
                marked += text[done:position]
                done = position
            marked += by_id[token]
            last = i
        return marked + text[done:]

    # ------------------------------------------------------------------------ settings of a run

    def arguments(self, count, settings, gaps=False, chat=False):
        """The keyword arguments of engine.generate, or of infill if `gaps`, for `count` new tokens.

        settings: steps, block_length, temperature, remasking, cache, cfg_scale, schedule, seed and
        those in NOT_USED, with the meaning of sample.py's constants; 0, "" and "auto" leave the
        choice to us, and this is the choice. Raises ValueError for what cannot be read; ranges are
        for the engine to check, and for a model that edits, which takes none of these.
        """
        if self.edits:
            raise ValueError(f"{self.name} edits texts: sample.py can use it, but no chat, server "
                             "or task that fills masks")
        s = {**NOT_USED, **settings}
        arguments = {} if gaps else {"max_new_tokens": count}
        if self.has_noise:
            return arguments | self.noise_arguments(count, s, gaps)
        remasking, block_length = self.choose_rule(s, count, gaps, chat)
        steps = s["steps"]
        if not steps:                                   # one token a step
            size = own_block_length(self.config, block_length) or 1
            steps = count + -count % size               # the last block counts whole
        if self.config.blocks_from_start:
            block_length = s["block_length"] or self.config.block_length    # LLaDA2: its own
            if not s["steps"]:
                steps += 2 * block_length               # and the first one, too
        arguments["steps"], arguments["block_length"] = steps, block_length
        arguments["temperature"] = self.choose_temperature(s, gaps, chat)
        arguments["remasking"] = remasking
        arguments["cache"] = self.choose_cache(s)
        for name in ("cfg_scale", "seed", "remask", "remask_schedule"):
            arguments[name] = s[name]
        for name in ("threshold", "factor", "entropy_bound", "top_k", "alg_temp", "schedule"):
            arguments[name] = s[name] or None
        if s["edit_threshold"] >= 0:
            arguments["edit_threshold"] = s["edit_threshold"]
        arguments["top_p"] = None if s["top_p"] == 1 else s["top_p"]
        for name in ("suppress", "defer"):
            arguments[name] = self.named_tokens(name, s[name])
        return arguments

    def noise_arguments(self, count, s, gaps):
        """The keyword arguments of noises.reverse for settings s. ValueError for one that only
        models of masks take."""
        refuse_for_masks(s, {**FOR_MASKS, "schedule": ""},
                         f"{self.name} undoes {self.config.noise} noise, where every token may "
                         "change in every step, and takes steps, temperature and seed")
        return {"steps": s["steps"] or count, "seed": s["seed"],
                "temperature": self.choose_temperature(s, gaps, False)}

    def without_effect(self, settings):
        """Lines that say which of sample.py's or eval.py's settings this checkpoint does not use,
        or a text that is filled or edited. What it cannot do at all is refused elsewhere."""
        lines, own = [], own_block_length(self.config, None)
        way = "one token after another" if self.config.causal else f"in blocks of {own} tokens"
        asked = settings["block_length"]
        if own and asked not in (0, own) and not self.config.blocks_from_start:
            lines.append(f"block_length {asked} is not used: {self.name} writes {way}")
        if self.config.causal and settings["steps"]:
            lines.append(f"steps {settings['steps']} is not used: {self.name} writes {way}")
        elif settings["steps"] and not self.edits:
            lines += self.steps_without_effect(settings)
        given = settings.get("infill") or settings.get("edit")
        if settings["max_new_tokens"] and given:
            lines.append(f"max_new_tokens {settings['max_new_tokens']} is not used: a text with "
                         "gaps, or one to edit, is given whole")
        return lines

    def steps_without_effect(self, settings):
        """The line that says so where a rule decides how many tokens a step keeps. Beside LLaDA2's
        threshold they count: see Row.plan in engine.py."""
        for rule in ADAPTIVE:
            if settings.get(rule) and not (rule == "threshold" and self.config.threshold):
                return [f"steps {settings['steps']} is not used: {rule} decides how many tokens a "
                        "step keeps"]
        return []

    def choose_rule(self, s, count, gaps, chat):
        """(remasking, block_length) for settings s: as asked, or else our choice. block_length is
        how many tokens are denoised together; None, of gaps: all.

        A published model keeps what it is surest of, anywhere. A small one, as train_scratch.py
        makes them, writes the best texts by entropy in blocks of 8. But not in a chat, nor grids,
        where one wrong digit spoils all, nor where a setting of OTHER_RULES is given.
        """
        remasking, block_length = "low_confidence", None if gaps else count
        if s["remask"]:
            remasking = "ancestral"
        elif (self.config.family == "unmask" and not chat and self.grid is None
              and not any(s[name] for name in OTHER_RULES)):
            # With `steps`, several tokens are written at once. The surest ones are alike then.
            remasking = "random" if s["steps"] else "entropy"
        if s["remasking"] != "auto":
            remasking = s["remasking"]
        elif remasking == "entropy" and not gaps:
            block_length = min(8, count)
        return remasking, s["block_length"] or block_length

    def choose_temperature(self, s, gaps, chat):
        """A small model repeats itself when it is greedy; but of a puzzle the most probable
        solution is wanted, and of a published model, or in a chat, the most probable text."""
        if s["temperature"] == "auto":
            is_puzzle = self.grid is not None and gaps
            is_free = self.config.family == "unmask" and not chat and not is_puzzle
            return 0.5 if is_free else 0.0
        try:
            return float(s["temperature"])
        except ValueError:
            raise ValueError("temperature takes a number or auto, got "
                             f"{s['temperature']!r}") from None

    def choose_cache(self, s):
        if s["cache"] in ("none", ""):
            return None
        if s["cache"] not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {s['cache']!r}")
        if s["cache"] != "auto":
            return s["cache"]
        by_blocks = self.config.block_length and not self.config.causal
        return "block" if by_blocks else None           # exact, so there is no reason against it

    def named_tokens(self, setting, text):
        """The ids, a tuple, of tokens in a comma-separated text: ids, names such as <|im_end|>, eos
        (ends of text) or eot (of a turn). Raises ValueError for a name that is none."""
        tokens = set()
        for name in text.split(","):
            name = name.strip()
            if name == "eos":
                tokens |= self.ends
            elif name == "eot":
                tokens |= self.end_of_turn
            elif name:
                tokens.add(self.named_token(setting, name))
        return tuple(sorted(tokens))

    def named_token(self, setting, name):
        if name.isascii() and name.isdigit() and len(name) < 10:
            return int(name)
        token = self.tokenizer.backend.token_to_id(name)
        if token is None:
            raise ValueError(f"{setting} takes ids or names of tokens, eos or eot, separated by "
                             f"commas, got {name!r}")
        return token

    def fit(self, prompt, max_new_tokens, most=128):
        """How many tokens to generate after a prompt: what was asked for, or if that is 0 what
        fits, `most` at most; of a grid always the rest. Raises ValueError when they do not fit."""
        room = self.config.max_len - len(prompt)
        if self.grid is not None:
            most = room = min(room, self.grid.cells - len(prompt))
            if max_new_tokens not in (0, room):
                raise ValueError(f"this model writes whole grids, {self.grid.cells} cells: leave "
                                 "max_new_tokens at 0")
        if room < max(max_new_tokens, 1):
            context = self.config.max_len if self.grid is None else self.grid.cells
            raise ValueError(f"{len(prompt)} tokens of prompt and {max(max_new_tokens, 1)} new "
                             f"ones exceed the context of {context}")
        return max_new_tokens or min(most, room)

    def run(self, sequences, arguments, gaps=False, on_step=None):
        """engine.generate, or infill if `gaps`: list of token lists -> list of token lists."""
        if self.has_noise:
            return self.undo_noise(sequences, on_step=on_step, **arguments)
        if gaps:
            return infill(self.model, sequences, on_step=on_step, **arguments)
        return generate(self.model, sequences, on_step=on_step, **arguments)

    def undo_noise(self, sequences, max_new_tokens=0, on_step=None, **arguments):
        """noises.reverse for token lists of one length, each with so many new tokens after it:
        list of token lists. on_step gets a `Step`, as from the engine. Raises ValueError."""
        canvas = [list(row) + [self.mask_id] * max_new_tokens for row in sequences]
        if len({len(row) for row in canvas}) != 1:
            raise ValueError(f"{self.name} writes rows of one length together, got lengths "
                             f"{[len(row) for row in canvas]}")
        canvas = torch.tensor(canvas)
        is_open, lengths = canvas == self.mask_id, torch.tensor([canvas.shape[1]] * len(canvas))

        def tell(number, tokens, sureness):
            on_step(Step(number, tokens, is_open, sureness, lengths, torch.zeros_like(lengths)))

        device = next(self.model.parameters()).device
        with kernels.packed(self.model):
            written = reverse(self.model, canvas.to(device), on_step=on_step and tell, **arguments)
        return written.tolist()
