"""Text to token ids and back: our own byte-level tokenizers, and whatever tokenizer a published checkpoint brings.

Everything runs on the `tokenizers` library, so a checkpoint's tokenizer.json is read exactly, and ours is one that
other programs read. What is added here is what surrounds it: which id is the mask, the end, the padding; the chat
template; building a tokenizer from the older vocab.txt or vocab.json + merges.txt files.

A rule to know: `encode` treats text as text. A document that spells "<|endoftext|>" becomes the characters, not the
control token, unless the caller says parse_special=True (as the chat template, which writes control tokens, must).
The mask is stricter still: it stands for what the model fills in, so nobody's words may become one.
All of this repository encodes with parse_special=False or with parse_mask=False. The default, True,
is what `transformers` does.
"""

import contextlib
import functools
import itertools
import json
import os
import secrets
import sys
import threading
import time
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

EOS, MASK, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>")
OWN_ROLES = {"eos_token": EOS, "pad_token": EOS, "bos_token": EOS, "mask_token": MASK}

# ChatML, for checkpoints that bring no template of their own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_told_of_no_template = set()      # folders of which note_missing_template has spoken


class Tokenizer:
    """Attributes: `vocab_size` (the largest id + 1), `mask_token_id`, `eos_token_id`, `pad_token_id`, `bos_token_id`
    (int or None), `mask_token` (str or None), `roles` ({"eos_token": its text}) and `chat_templates` ({name: jinja}).

    Make one with Tokenizer.train, .bytes, .gpt2 or .from_pretrained. Bad input is a ValueError or FileNotFoundError.
    """

    _lock = threading.Lock()      # encode_special_tokens is a switch of the backend, and a server has threads

    def __init__(self, backend, roles=OWN_ROLES, chat_templates=None, config_ids=None):
        """backend: tokenizers.Tokenizer; config_ids: {"mask_token_id": int, ...}, used where the roles are silent."""
        backend.no_truncation()      # a tokenizer.json may carry the limits of whoever saved it; a corpus has none
        backend.no_padding()
        self.backend, self.roles, self.config_ids = backend, dict(roles), config_ids or {}
        self.chat_templates = chat_templates or {"default": CHAT_TEMPLATE}
        self.without_template = None      # folder of a checkpoint that brought no chat template
        self.has_chat_tokens = False      # whether add_chat_tokens has prepared it for ChatML
        self._set_ids()
        # Each byte its own id and nothing around it: then the text's UTF-8 bytes are the ids, no library needed.
        self._is_bytes = (backend.get_vocab(with_added_tokens=False) == _byte_vocab()
                          and backend.normalizer is None and backend.post_processor is None)

    def _set_ids(self):
        vocab = self.backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ValueError("the tokenizer has an empty vocabulary")
        self.vocab_size = 1 + max(vocab.values())
        self.mask_token_id = self._role_id("mask")
        self.pad_token_id = self._role_id("pad")
        # BERT knows no beginning and end of text: [CLS] and [SEP] play those parts.
        self.bos_token_id = self._role_id("bos", "cls")
        self.eos_token_id = self._role_id("eos", "sep")
        self.mask_token = None if self.mask_token_id is None else self.backend.id_to_token(self.mask_token_id)
        self._unmasked = None         # what unmasked_backend makes when it is first needed

    def _role_id(self, *names):
        for name in names:
            if f"{name}_token" in self.roles:
                return self.backend.token_to_id(self.roles[f"{name}_token"])
            if f"{name}_token_id" in self.config_ids:
                return self.config_ids[f"{name}_token_id"]
        return None

    # ---------------------------------------------------------------- four ways to get one

    @classmethod
    def train(cls, texts, vocab_size=2048):
        """Byte-level BPE learned from an iterable of str (seconds for megabytes). vocab_size counts all ids: the 256
        bytes, the pieces, and last the 4 special tokens; a small corpus may yield fewer. ValueError below 260."""
        check_vocab_size(vocab_size)
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_TOKENS), min_frequency=2, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator(texts, trainer)
        return cls(_with_special_tokens(backend))

    @classmethod
    def bytes(cls):
        """The 256 byte values, each its own id, and the 4 special tokens as 256..259."""
        return cls(_with_special_tokens(_byte_level(models.BPE(vocab=_byte_vocab(), merges=[]))))

    @classmethod
    def gpt2(cls):
        """GPT-2's 50257 tokens and our other 3 special ones. tiktoken downloads them once; ConnectionError off-line."""
        import tiktoken

        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except (OSError, ValueError) as error:      # requests' exceptions are OSErrors; ValueError: a damaged download
            raise ConnectionError(f"GPT-2's BPE could not be downloaded ({type(error).__name__}): connect once, point "
                                  "TIKTOKEN_CACHE_DIR at a copy of its cache, or take --tokenizer=bpe") from None
        return cls.from_ranks(ranks)

    @classmethod
    def from_ranks(cls, ranks):
        """A byte-level BPE from tiktoken's {piece in bytes: rank = id}, GPT-2's regex; special tokens come last."""
        characters = _byte_characters()

        def spell(piece):
            return "".join(characters[byte] for byte in piece)

        merges = [tuple(map(spell, _halves(piece, ranks))) for piece in sorted(ranks, key=ranks.get) if len(piece) > 1]
        vocab = {spell(piece): rank for piece, rank in ranks.items()}
        return cls(_with_special_tokens(_byte_level(models.BPE(vocab=vocab, merges=merges))))

    @classmethod
    def from_pretrained(cls, folder):
        """The tokenizer in a checkpoint's folder: tokenizer.json, or else vocab.txt (BERT) or vocab.json + merges.txt
        (GPT-2, RoBERTa, Qwen2, Dream); special tokens and templates from the config files beside it.
        FileNotFoundError when there is none of these, ValueError naming the file that is damaged."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no tokenizer at {folder}: there is no such folder")
        settings = _read_json(folder / "tokenizer_config.json")
        config = _read_json(folder / "generation_config.json") | _read_json(folder / "config.json")
        family = _family(settings, config)
        roles = _read_roles(folder, settings, family)
        backend = _load_backend(folder, settings, family, roles)
        _add_declared_tokens(backend, folder, settings, family, roles)
        _follow_settings(backend, folder / "tokenizer_config.json", settings, config, roles)
        roles = {role: token for role, token in roles.items() if backend.token_to_id(token) is not None}
        templates = _read_chat_templates(folder, settings)
        tokenizer = cls(backend, roles, templates, _read_config_ids(config, folder))
        tokenizer.without_template = folder if templates is None else None
        return tokenizer

    # ---------------------------------------------------------------- text <-> ids

    def encode(self, text, add_special_tokens=False, parse_special=False, parse_mask=True):
        """The ids of one str. add_special_tokens wraps them as the checkpoint does ([CLS] ... [SEP]); parse_special
        turns text that spells a special token into that token, as `transformers` does. With
        parse_mask=False the mask is excepted: its spelling stays text, as without parse_special."""
        return self.encode_batch([text], add_special_tokens, parse_special, parse_mask)[0]

    def encode_batch(self, texts, add_special_tokens=False, parse_special=False, parse_mask=True):
        """The ids of many texts, on all cores: list of list of int. ValueError for what is not Unicode text."""
        texts = list(texts)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("only str can be encoded, one by one or in a list")
        if self._is_bytes and not parse_special:
            return [list(text.encode("utf-8")) for text in texts]
        rows = self._encode(self.backend, texts, add_special_tokens, parse_special)
        if parse_special and parse_mask:
            return rows
        # A mask can come from a special token, from an added token that is not special (which the
        # library finds in text as well), or from the vocabulary itself. Whatever it was, such a
        # text is encoded again without it.
        masks = self._mask_ids()
        masked = [i for i, ids in enumerate(rows) if any(mask in ids for mask in masks)]
        if masked:
            texts = [texts[i] for i in masked]
            again = self._encode(self.unmasked_backend(), texts, add_special_tokens, parse_special)
            for i, ids in zip(masked, again):
                rows[i] = ids
        return rows

    def _encode(self, backend, texts, add_special_tokens, parse_special):
        try:
            with self._lock:
                backend.encode_special_tokens = not parse_special
                encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except Exception as error:  # noqa: BLE001  the library raises nothing narrower, say for a model without [UNK]
            raise ValueError(f"this text cannot be encoded: {_one_line(error)}") from None
        return [encoding.ids for encoding in encodings]

    def _mask_ids(self):
        """The ids that no text may become: the tokenizer's mask, and config.json's if that differs.
        A token with a second part to play (an unknown token that masks, too) must stay readable."""
        masks = {self.mask_token_id, self.config_ids.get("mask_token_id")} - {None}
        others = [self.backend.token_to_id(token) for role, token in self.roles.items()
                  if role not in ("mask_token", "pad_token")]
        return masks - set(others)

    def unmasked_backend(self):
        """A copy of the backend in which masks have names that nobody can guess.

        So their own names are ordinary text, and every id stays what it was."""
        if self._unmasked is None:
            masks = [self.backend.id_to_token(mask) for mask in self._mask_ids()]
            names = {mask: secrets.token_hex(16) for mask in masks}
            layout = json.loads(self.backend.to_str())
            for token in layout["added_tokens"]:
                token["content"] = names.get(token["content"], token["content"])
            model = layout["model"]
            if isinstance(model["vocab"], dict):
                model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
            else:                         # Unigram: [[piece, score], ...], the place is the id
                vocab = model["vocab"]
                model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
            if "merges" in model:         # [left, right]: none may make the mask, or use it
                model["merges"] = [[left, right] for left, right in model["merges"]
                                   if not {left, right, left + right} & set(names)]
            self._unmasked = Backend.from_str(json.dumps(layout))
        return self._unmasked

    def decode(self, ids, skip_special_tokens=False):
        """The text of an iterable of ids. Ids that are no token (a padded embedding has some) are left out."""
        ids = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_answer(self, ids):
        """The text before the first special token."""
        special = {token for token, added in self.backend.get_added_tokens_decoder().items() if added.special}
        return self.decode(itertools.takewhile(lambda token: token not in special, ids))

    def frame(self):
        """(head, tail): the ids that the checkpoint puts in front of a text and behind it, as [CLS]
        and [SEP]; often none. An empty text would not tell which of them stand behind it."""
        try:
            encoding = self.backend.encode("a", add_special_tokens=True)
        except Exception:  # noqa: BLE001  a vocabulary without "a" and [UNK]
            encoding = self.backend.encode("", add_special_tokens=True)
        added = [bool(flag) for flag in encoding.special_tokens_mask]
        if all(added):
            behind = int(encoding.ids[-1:] == [self.eos_token_id])
            middle = len(encoding.ids) - behind
            return encoding.ids[:middle], encoding.ids[middle:]
        first, last = added.index(False), len(added) - added[::-1].index(False)
        return encoding.ids[:first], encoding.ids[last:]

    # ---------------------------------------------------------------- chat

    def render_chat(self, messages, add_generation_prompt=True, template="default", **variables):
        """The text of a conversation [{"role": "user", "content": "..."}, ...] in the checkpoint's own format.

        `variables` go to the template (tools=..., enable_thinking=...). ValueError when the template refuses the
        messages, reaches outside its sandbox or does not end."""
        self.note_missing_template()
        if template not in self.chat_templates:
            known = ", ".join(sorted(self.chat_templates))
            raise ValueError(f"no chat template called {template!r}; this tokenizer has {known}")
        variables = {"tools": None, "documents": None, **self.roles, **variables,
                     "messages": messages, "add_generation_prompt": add_generation_prompt}
        return render_template(self.chat_templates[template], variables)

    def apply_chat_template(self, messages, add_generation_prompt=True, template="default", **variables):
        """render_chat as ids. Control tokens count wherever they are spelled, in messages too, as
        in `transformers`; but the mask's spelling is text."""
        text = self.render_chat(messages, add_generation_prompt, template, **variables)
        return self.encode(text, parse_special=True, parse_mask=False)

    def note_missing_template(self):
        """Say, once in a process, that ChatML stands in where a checkpoint brought no template."""
        if self.without_template is None or self.chat_templates != {"default": CHAT_TEMPLATE}:
            return
        folder = str(Path(self.without_template).resolve())
        first = folder not in _told_of_no_template
        _told_of_no_template.add(folder)
        if first and os.environ.get("RANK", "0") == "0":      # one process of torchrun's is enough
            print(f"note: {self.without_template} has no chat template: ChatML (<|im_start|>user) "
                  "is used, which the model may never have seen", file=sys.stderr, flush=True)

    # ---------------------------------------------------------------- growing and saving

    def add_special_tokens(self, tokens):
        """Make each str a special token and return the ids; new ones come last, and the model must be resized."""
        self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        self._set_ids()
        return [self.backend.token_to_id(token) for token in tokens]

    def add_mask_token(self):
        """The id of the mask token, after adding `<|mask|>` where there is none."""
        if self.mask_token_id is None:
            self.roles["mask_token"] = MASK
            self.add_special_tokens([MASK])
        return self.mask_token_id

    def add_chat_tokens(self):
        """Make the tokens of our own chat template special, where it is used because the checkpoint brought none."""
        if self.chat_templates == {"default": CHAT_TEMPLATE}:
            self.add_special_tokens([IM_START, IM_END])
            self.has_chat_tokens = True

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json; from_pretrained and transformers' AutoTokenizer read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = {f"{name}_token": self.backend.id_to_token(i) for name in ("mask", "eos", "pad", "bos")
                  if (i := getattr(self, f"{name}_token_id")) is not None}
        templates = [{"name": name, "template": text} for name, text in self.chat_templates.items()]
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # Its readers take false where it is not named, whatever tokenizer.json says.
            "add_prefix_space": bool(_state(self.backend.pre_tokenizer).get("add_prefix_space")),
            **{role: token for role, token in (tokens | self.roles).items() if token is not None},
            "chat_template": templates[0]["template"] if list(self.chat_templates) == ["default"] else templates,
        }
        # A checkpoint without a template stays one, unless it was prepared for ChatML: it does not
        # learn that by being copied.
        stands_in = self.without_template and self.chat_templates == {"default": CHAT_TEMPLATE}
        if stands_in and not self.has_chat_tokens:
            del settings["chat_template"]
        settings = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        for name, content in (("tokenizer.json", self.backend.to_str(pretty=True)), ("tokenizer_config.json", settings)):
            (folder / f"{name}.tmp").write_text(content, encoding="utf-8")
            (folder / f"{name}.tmp").replace(folder / name)        # a kill at any moment leaves a whole file


# ---------------------------------------------------------------- byte-level BPE

def check_vocab_size(vocab_size):
    """ValueError for a vocabulary that cannot hold the bytes and the special tokens, or is absurd."""
    smallest, largest = 256 + len(SPECIAL_TOKENS), 2**20
    if not smallest <= vocab_size <= largest:
        raise ValueError(f"vocab_size is {vocab_size:,}: take {smallest} (256 bytes and {len(SPECIAL_TOKENS)} special "
                         f"tokens) to {largest:,}")


def _byte_characters():
    """GPT-2's printable stand-in for each of the 256 bytes: itself if it prints, else the next character after 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _byte_vocab():
    return {character: byte for byte, character in enumerate(_byte_characters())}


def _byte_level(model):
    """Around a BPE model: GPT-2's split into words, bytes as characters. No normalizer: decode(encode(x)) == x."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_special_tokens(backend):
    # Added after training, so their ids are the last ones and no piece learned from text can be one of them.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return backend


def _halves(piece, ranks):
    """The two pieces that BPE merged last to make this one: tiktoken has ranks only, tokenizer.json needs the pairs."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ---------------------------------------------------------------- reading a checkpoint's files

# What `tokenizer_class` (without its "TokenizerFast") or else `model_type` says of how text is split.
FAMILIES = {"bert": "bert", "distilbert": "bert", "roberta": "roberta", "gpt2": "gpt2",
            "qwen2": "qwen2", "qwen3": "qwen2", "dream": "qwen2"}

# The special tokens a family has unless its files say otherwise (bert-base-uncased's files are silent on [MASK]).
FAMILY_ROLES = {
    "bert": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
             "mask_token": "[MASK]"},
    "roberta": {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>",
                "pad_token": "<pad>", "mask_token": "<mask>"},
    "gpt2": {"unk_token": EOS, "bos_token": EOS, "eos_token": EOS},
    "qwen2": {"unk_token": EOS, "eos_token": EOS, "pad_token": EOS},
}
ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# Some classes of `transformers` change what tokenizer.json says, by tokenizer_config.json or by a
# default of their own. These put BOS and EOS around a text:
# {class: (its bos_token, its eos_token, whether it adds BOS unless told otherwise)}.
FRAMING = {
    "Llama": ("<s>", "</s>", True),
    "CodeLlama": ("<s>", "</s>", True),
    "Gemma": ("<bos>", "<eos>", True),
    "Cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", True),
    "GPTNeoX": (EOS, EOS, False),
}
# These set the lower case and the accents of BERT's normalizer.
NORMALIZING = ("Bert", "DistilBert", "Electra", "ConvBert", "Funnel", "LayoutLM", "Lxmert",
               "MobileBert", "SqueezeBert", "MPNet", "Splinter")
# These do neither: they read tokenizer.json as it is, but for `add_prefix_space`.
PLAIN = ("PreTrained", "GPT2", "Qwen2", "Roberta", "Bart", "Longformer", "Deberta", "Whisper",
         "XLMRoberta", "Bloom", "T5")
# The class (without its "TokenizerFast") of a checkpoint that names none.
CLASS_OF_MODEL = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen2", "gpt2": "GPT2",
                  "bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta",
                  "modernbert": "PreTrained"}

# Qwen2 splits digits one by one and keeps a newline with what stands before it; GPT-2's rule is inside ByteLevel.
QWEN2_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def _one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read_json(path):
    """The object in a JSON file, {} when the file does not exist, ValueError naming it when it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")  # noqa: TRY004
    return value


def _family(settings, config):
    for name in (settings.get("tokenizer_class"), config.get("model_type")):
        name = str(name).removesuffix("Fast").removesuffix("Tokenizer").lower().removeprefix("a2d-")
        if name in FAMILIES:
            return FAMILIES[name]
    return None


def _token(value, path):
    """(text, flags) of a token as config files write it: a str, or a dict with "content" and AddedToken's flags."""
    flags = {}
    if isinstance(value, dict):
        flags = {name: flag for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
                 if isinstance(flag := value.get(name), bool)}
        value = value.get("content")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path} has a special token that is not a string: {_one_line(repr(value))}")
    return value, flags


def _read_roles(folder, settings, family):
    """{"mask_token": "[MASK]", ...}: the family's, overruled by special_tokens_map.json, by tokenizer_config.json."""
    roles = dict(FAMILY_ROLES.get(family, {}))
    for name, values in (("special_tokens_map.json", _read_json(folder / "special_tokens_map.json")),
                         ("tokenizer_config.json", settings)):
        roles |= {role: value and _token(value, folder / name)[0] for role, value in values.items() if role in ROLES}
    return {role: token for role, token in roles.items() if token}      # an explicit null says: none


def _read_config_ids(config, folder):
    """mask_token_id and its like from config.json; a list of end tokens (Llama 3) gives its first:
    data/checkpoints.py reads them all."""
    ids = {}
    for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        value = config.get(name)
        if isinstance(value, list) and (name == "eos_token_id" and value or len(value) == 1):
            value = next((token for token in value if token is not None and token != -1), None)
        if value is None or value == -1:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{folder}: {name} in the config should be a token id, not {_one_line(repr(value))}")
        ids[name] = value
    return ids


def _load_backend(folder, settings, family, roles):
    """The `tokenizers` object of a folder, from the first kind of file that it has."""
    has = {name for name in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model")
           if (folder / name).is_file()}
    try:
        if "tokenizer.json" in has:
            return Backend.from_file(str(folder / "tokenizer.json"))
        if "vocab.txt" in has:
            return _wordpiece(folder / "vocab.txt", settings, roles)
        if {"vocab.json", "merges.txt"} <= has:
            return _bpe(folder, settings, family, roles)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower for a damaged file
        names = ", ".join(sorted(has - {"tokenizer.model"}))
        raise ValueError(f"{folder}: {names} cannot be read as a tokenizer: {_one_line(error)}") from None
    if "tokenizer.model" in has:
        raise ValueError(f"{folder} has only tokenizer.model (sentencepiece): write a tokenizer.json once, with "
                         f"`transformers`: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
    raise FileNotFoundError(f"no tokenizer in {folder}: looked for tokenizer.json, vocab.txt, "
                            "and vocab.json with merges.txt")


def _wordpiece(path, settings, roles):
    """BERT: words, then the longest pieces of a vocabulary that has one token a line."""
    lines = _read_text(path).split("\n")
    vocab = {token: i for i, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    unk, cls, sep = (roles.get(role, "") for role in ("unk_token", "cls_token", "sep_token"))
    for token in (unk, cls, sep):
        if token not in vocab:
            raise ValueError(f"{path} has no token {token!r}, which a WordPiece tokenizer needs")
    backend = Backend(models.WordPiece(vocab, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, lowercase=settings.get("do_lower_case", True), strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0", pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])])
    return backend


def _bpe(folder, settings, family, roles):
    """GPT-2, RoBERTa and Qwen2 (Dream): byte-level BPE, each with its way to split words and its frame of tokens."""
    if family not in ("gpt2", "roberta", "qwen2"):
        raise ValueError(f"{folder} has vocab.json and merges.txt, but neither config.json nor tokenizer_config.json "
                         "says that it is gpt2, roberta, qwen2, qwen3 or dream: save it once with a tokenizer.json")
    vocab = _read_json(folder / "vocab.json")
    lines = _read_text(folder / "merges.txt").split("\n")
    lines = lines[lines[0].startswith("#version") :]        # only the first: "# version" may well be a merge
    merges = [tuple(line.split(" ")) for line in lines if line.strip()]
    backend = _byte_level(models.BPE(vocab=vocab, merges=merges))
    prefix_space = settings.get("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if family == "roberta":
        cls, sep = ((token, vocab[token]) for token in (roles["cls_token"], roles["sep_token"]))
        backend.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=prefix_space)
    if family == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)])
    return backend


def _follow_settings(backend, path, settings, config, roles):
    """Change the backend as that class does by which `transformers` reads the folder: BOS and EOS,
    lower case and accents, a space in front of a text. `path` is that of tokenizer_config.json.
    ValueError for what cannot be followed."""
    name = _class_name(settings, config)
    flags = {}
    for key in ("add_bos_token", "add_eos_token", "do_lower_case", "strip_accents",
                "tokenize_chinese_chars", "add_prefix_space"):
        value = settings.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{path}: {key} should be true or false, not {_one_line(repr(value))}")
        flags[key] = value
    has_tokenizer_json = path.with_name("tokenizer.json").is_file()
    if name in FRAMING:
        _set_frame(backend, path, settings, FRAMING[name], roles)
    elif name == "GPT2" and flags["add_bos_token"] and not has_tokenizer_json:
        # OPT: this class adds BOS, never EOS, where it has only vocab.json and merges.txt.
        _set_frame(backend, path, {**settings, "add_eos_token": False}, (EOS, EOS, False), roles)
    elif name in NORMALIZING:
        _set_normalizer(backend, path, flags, name)
    elif name not in PLAIN:
        _check_unknown_class(backend, path, flags, settings.get("tokenizer_class"), roles)
    _set_prefix_space(backend, path, flags["add_prefix_space"], name)


def _class_name(settings, config):
    """The class that the files name, or that their model type has, "Llama" for LlamaTokenizerFast;
    None: neither is known."""
    for named in (settings.get("tokenizer_class"), config.get("tokenizer_class")):
        if isinstance(named, str):
            return named.removesuffix("Fast").removesuffix("Tokenizer")
    return CLASS_OF_MODEL.get(config.get("model_type"))


def _state(component):
    """The settings of a part of the backend, as tokenizer.json has them; {} for none."""
    return {} if component is None else json.loads(component.__getstate__())


def _set_frame(backend, path, settings, defaults, roles):
    """The classes of FRAMING replace what tokenizer.json puts around a text by BOS and EOS, each if
    it is wanted."""
    bos, eos, bos_is_default = defaults
    used = {}                                   # {"bos_token": its text}
    for key, default, wanted in (("bos_token", bos, bos_is_default), ("eos_token", eos, False)):
        if key not in settings:
            roles.setdefault(key, default)
        if not settings.get(f"add_{key}", wanted):
            continue
        token = roles.get(key)
        if token is None or backend.token_to_id(token) is None:
            if f"add_{key}" in settings:
                raise ValueError(f"{path}: add_{key} is true, but {key} is {token!r}, which the "
                                 "tokenizer has not")
            return              # only a default asks for it, and this vocabulary is of another kind
        used[key] = token
    head = [f"{used['bos_token']}:0"] if "bos_token" in used else []
    tail = [f"{used['eos_token']}:0"] if "eos_token" in used else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*head, "$A:0", *tail], pair=[*head, "$A:0", *tail, *head, "$B:0", *tail],
        special_tokens=[(token, backend.token_to_id(token)) for token in set(used.values())])


def _set_normalizer(backend, path, flags, name):
    """The classes of NORMALIZING set what BERT's normalizer does; any other they leave as it is."""
    state = _state(backend.normalizer)
    if not state and (flags["do_lower_case"] or flags["strip_accents"]):
        raise ValueError(f"{path} asks for lower case or no accents, but tokenizer.json has no "
                         "normalizer: correct one of them")
    if state.get("type") != "BertNormalizer":
        return
    chinese = flags["tokenize_chinese_chars"] is not False
    if name in ("MPNet", "Splinter"):
        chinese = state["handle_chinese_chars"]
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=state["clean_text"], handle_chinese_chars=chinese,
        strip_accents=flags["strip_accents"], lowercase=flags["do_lower_case"] is not False)


def _set_prefix_space(backend, path, wanted, name):
    """Every class sets `add_prefix_space` of the pre-tokenizer, if that is ByteLevel and not one
    part of several; false where tokenizer_config.json is silent. Llama and T5 would convert
    tokenizer.model instead, which is not read here."""
    if name in ("Llama", "T5"):
        if wanted is not None and wanted != _prefixes_space(backend):
            raise ValueError(f"{path}: add_prefix_space is {str(wanted).lower()}, but "
                             "tokenizer.json does otherwise: correct one of them")
        return
    state = _state(backend.pre_tokenizer)
    if wanted is None and name is not None:
        wanted = False
    if name in ("Bloom", "Cohere") and wanted and '"add_prefix_space": false' in json.dumps(state):
        raise ValueError(f"{path}: add_prefix_space is true and tokenizer.json says false: correct "
                         "one of them")
    if wanted is not None and state.get("type") == "ByteLevel":
        del state["type"]
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{**state, "add_prefix_space": wanted})


def _prefixes_space(backend):
    """Whether a text is read as if it began with a space."""
    text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
    if backend.pre_tokenizer is not None:
        pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        text = pieces[0][0] if pieces else ""
    return text[:1] in (" ", "\u2581", "\u0120")  # a space, Llama's and GPT-2's sign for one


def _check_unknown_class(backend, path, flags, named, roles):
    """ValueError if the settings of a class that is not known here contradict tokenizer.json."""
    normalizer = _state(backend.normalizer)
    head, tail = Tokenizer(backend, roles).frame()
    does = {"add_bos_token": bool(head), "add_eos_token": bool(tail),
            "do_lower_case": normalizer.get("lowercase")}
    for key, value in does.items():
        if value is not None and flags[key] not in (None, value):
            raise ValueError(f"{path}: {key} is {str(flags[key]).lower()}, tokenizer.json does "
                             f"otherwise, and what tokenizer_class {named!r} makes of that is not "
                             "known here: correct one of them")


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None


def _add_declared_tokens(backend, folder, settings, family, roles):
    """Tell the backend of the tokens that only the config files declare, and check the ids of those it knows."""
    declared = _added_tokens(folder, settings, roles)                                     # [(id, AddedToken)]
    present = backend.get_added_tokens_decoder()
    known = {token.content for token in present.values()} | {token.content for _, token in declared}
    for text in dict.fromkeys([*roles.values(), *_extra_tokens(folder, settings)]):
        # A family's default is a guess: it must not grow the vocabulary of a checkpoint that has no such token.
        guessed = text in FAMILY_ROLES.get(family, {}).values() and backend.token_to_id(text) is None
        if text not in known and not guessed:
            swallows_space = family == "roberta" and text == roles.get("mask_token")      # "a <mask>" has no token " "
            declared.append((None, AddedToken(text, special=True, normalized=False, lstrip=swallows_space)))
    for index, token in declared:
        if present.get(index) != token:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        found = backend.token_to_id(token.content)
        if index is not None and found != index:
            raise ValueError(f"{folder}: {token.content!r} is token {index} by the config, {found} by the vocabulary")


def _extra_tokens(folder, settings):
    """Special tokens without a role, under the two names that `transformers` gives them."""
    path = folder / "tokenizer_config.json"
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = settings.get(name) or []
        if not isinstance(values, list | dict):
            raise ValueError(f"{path}: {name} should be a list of tokens")  # noqa: TRY004
        yield from (_token(value, path)[0] for value in (values.values() if isinstance(values, dict) else values))


def _added_tokens(folder, settings, roles):
    """[(id, AddedToken)] in the order of ids, from `added_tokens_decoder` or the older added_tokens.json."""
    path = folder / "tokenizer_config.json"
    entries = settings.get("added_tokens_decoder")
    if not entries:
        path = folder / "added_tokens.json"
        special = set(roles.values())
        entries = {i: {"content": text, "special": text in special, "normalized": text not in special}
                   for text, i in _read_json(path).items()}
    try:
        return sorted(((int(i), AddedToken(text, **flags)) for i, (text, flags) in
                       ((i, _token(value, path)) for i, value in entries.items())), key=lambda entry: entry[0])
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged added tokens: {_one_line(error)}") from None


def _read_chat_templates(folder, settings):
    """{"default": jinja text, ...} from chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return {"default": _read_text(folder / "chat_template.jinja")}
    path = folder / "chat_template.json"
    value = _read_json(path).get("chat_template")
    if value is None:
        path, value = folder / "tokenizer_config.json", settings.get("chat_template")
    if value is None:
        return None
    # Some checkpoints have several: [{"name": "default", "template": "..."}, {"name": "tool_use", "template": "..."}]
    entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
    if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
               for entry in entries):
        raise ValueError(f"{path}: chat_template is neither a text nor a list of named texts")
    return {entry["name"]: entry["template"] for entry in entries}


# ---------------------------------------------------------------- rendering a chat template

def render_template(text, variables, seconds=5.0):
    """Render a chat template that a stranger wrote: in jinja2's sandbox, with the helpers such templates expect, and
    for `seconds` at most. Whatever goes wrong in it is one ValueError."""
    try:
        with _deadline(seconds):
            return _compile(text).render(**variables)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  the template is a program: it can raise anything
        raise ValueError(f"the chat template failed: {_one_line(error)}") from None


@functools.lru_cache(maxsize=8)
def _compile(text):
    """Compiling a template takes far longer than rendering it."""
    return _sandbox().from_string(text)


@functools.cache
def _sandbox():
    """jinja2's immutable sandbox (no private attributes, no changes to its input), set up as `transformers` does."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context, operator, left, right):
            # These two can fill the memory in one call, where no deadline reaches.
            sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
            if operator == "**" or sizes[0] * sizes[1] > 10**7:
                raise SecurityError(f"{operator} with operands this large is not allowed")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant said; the text is all that matters here."""
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True)).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own tojson escapes <, > and & for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = time.strftime
    return sandbox


@contextlib.contextmanager
def _deadline(seconds):
    """Raise TimeoutError in Python code that runs longer: a trace function sees every line, in any thread."""
    end = time.monotonic() + seconds

    def trace(frame, event, argument):
        if time.monotonic() > end:
            raise TimeoutError(f"it ran longer than {seconds:g} seconds")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
