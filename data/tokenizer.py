"""Text to token ids and back: our own byte-level tokenizers, and whatever tokenizer a published
checkpoint brings.

Everything runs on the `tokenizers` library, so a checkpoint's tokenizer.json is read exactly, and
ours is one that other programs read. What is added here is what surrounds it: which id is the mask,
the end, the padding; the chat template. What we saved is read here, the files of others in
pretrained/tokenizer_files.py.

A rule to know: `encode` treats text as text. A document that spells "<|endoftext|>" becomes the
characters, not the control token, unless the caller says parse_special=True (as the chat template,
which writes control tokens, must). The mask is stricter still: it stands for what the model fills
in, so nobody's words may become one. All of this repository encodes with parse_special=False or
with parse_mask=False. The default, True, is what `transformers` does.
"""
import hashlib
import itertools
import json
import os
import secrets
import sys
import threading
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import common
from data.templates import one_line, render_template

EOS, MASK, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|mask|>", "<|im_start|>",
                                                "<|im_end|>")
ANY_CHARACTER = r"[\s\S]"
OWN_ROLES = {"eos_token": EOS, "pad_token": EOS, "bos_token": EOS, "mask_token": MASK}

# ChatML, for checkpoints that bring no template of their own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# save_pretrained writes a hash of its files under this name into tokenizer_config.json. Where it
# fits, and none of the other files stands beside it, the folder is as we left it.
MARKER = "saved_by_unmask"
FILES_OF_OTHERS = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json",
                   "added_tokens.json")

_told_of_no_template = set()      # folders of which note_missing_template has spoken


class Tokenizer:
    """Attributes: `vocab_size` (the largest id + 1), `mask_token_id`, `eos_token_id`,
    `pad_token_id`, `bos_token_id` (int or None), `mask_token` (str or None), `roles` ({"eos_token":
    its text}) and `chat_templates` ({name: jinja}).

    Make one with Tokenizer.train, .bytes, .characters, .gpt2 or .from_pretrained. Bad input is a
    ValueError or FileNotFoundError.
    """

    # encode_special_tokens is a switch of the backend, which the threads of a server share.
    _lock = threading.Lock()

    def __init__(self, backend, roles=OWN_ROLES, chat_templates=None, config_ids=None):
        """backend: tokenizers.Tokenizer; config_ids: {"mask_token_id": int, ...}, used where the
        roles are silent."""
        backend.no_truncation()   # a tokenizer.json may carry the limits of whoever saved it
        backend.no_padding()
        self.backend = backend
        self.roles = dict(roles)
        self.config_ids = config_ids or {}
        self.chat_templates = chat_templates or {"default": CHAT_TEMPLATE}
        self.without_template = None      # folder of a checkpoint that brought no chat template
        self.has_chat_tokens = False      # whether add_chat_tokens has prepared it for ChatML
        self._set_ids()
        # Each byte its own id and nothing around it: then the text's UTF-8 bytes are the ids, no
        # library needed.
        self._is_bytes = (backend.get_vocab(with_added_tokens=False) == _byte_vocab()
                          and backend.normalizer is None and backend.post_processor is None)
        self._characters = _character_vocab(backend)

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
        self.mask_token = self._text_of(self.mask_token_id)
        self._unmasked = None             # what unmasked_backend makes when it is first needed

    def _role_id(self, *names):
        """The id of the first of these roles that somebody plays, or None."""
        for name in names:
            if f"{name}_token" in self.roles:
                return self.backend.token_to_id(self.roles[f"{name}_token"])
            if f"{name}_token_id" in self.config_ids:
                return self.config_ids[f"{name}_token_id"]
        return None

    def _text_of(self, token_id):
        """The text of a token, None for no id or one outside the vocabulary."""
        return None if token_id is None else self.backend.id_to_token(token_id)

    # ----------------------------------------------------------------------------------------------
    # Five ways to get one

    @classmethod
    def train(cls, texts, vocab_size=2048):
        """Byte-level BPE learned from an iterable of str (seconds for megabytes). vocab_size counts
        all ids: the 256 bytes, the pieces, and last the 4 special tokens; a small corpus may yield
        fewer. ValueError below 260."""
        check_vocab_size(vocab_size)
        if isinstance(texts, str):      # letter by letter there is nothing to learn
            raise ValueError("a tokenizer learns from a list of texts, or whatever yields some")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS), min_frequency=2, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator(texts, trainer)
        return cls(_with_special_tokens(backend))

    @classmethod
    def bytes(cls):
        """The 256 byte values, each its own id, and the 4 special tokens as 256..259."""
        backend = _byte_level(models.BPE(vocab=_byte_vocab(), merges=[]))
        return cls(_with_special_tokens(backend))

    @classmethod
    def characters(cls, characters):
        """Each of these characters its own id, in this order, and the mask after them; there is no
        end of text, and any other character is a ValueError. For the digits of data/sudoku.py."""
        vocab = {character: i for i, character in enumerate(characters)}
        backend = Backend(models.WordLevel(vocab=vocab))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(ANY_CHARACTER), "isolated")
        backend.decoder = decoders.Fuse()               # no spaces between them
        backend.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
        return cls(backend, {"mask_token": MASK})

    @classmethod
    def gpt2(cls):
        """GPT-2's 50257 tokens and our other 3 special ones. tiktoken downloads them once;
        ConnectionError off-line."""
        import tiktoken

        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except (OSError, ValueError) as error:      # no network, or a damaged download
            raise ConnectionError(f"GPT-2's BPE could not be downloaded ({type(error).__name__}): "
                                  "connect once, point TIKTOKEN_CACHE_DIR at a copy of its cache, "
                                  "or take --tokenizer=bpe") from None
        return cls.from_ranks(ranks)

    @classmethod
    def from_ranks(cls, ranks):
        """A byte-level BPE from tiktoken's {piece in bytes: rank = id}, GPT-2's regex; special
        tokens come last."""
        characters = _byte_characters()

        def spell(piece):
            return "".join(characters[byte] for byte in piece)

        vocab = {spell(piece): rank for piece, rank in ranks.items()}
        merges = []
        for piece in sorted(ranks, key=ranks.get):
            if len(piece) > 1:
                left, right = _halves(piece, ranks)
                merges.append((spell(left), spell(right)))
        return cls(_with_special_tokens(_byte_level(models.BPE(vocab=vocab, merges=merges))))

    @classmethod
    def from_pretrained(cls, folder):
        """The tokenizer in a checkpoint's folder: what save_pretrained wrote, or the files of a
        published one (pretrained/tokenizer_files.py); or the one in a GGUF file. FileNotFoundError
        when there is none, ValueError naming the file that is damaged."""
        folder = Path(folder)
        if not folder.exists():
            raise FileNotFoundError(f"no tokenizer at {folder}: there is no such folder")
        own = _read_own(folder)
        if own is not None:
            backend, roles, templates, ids = own
        else:
            backend, roles, templates, ids = _read_published(folder)
        tokenizer = cls(backend, roles, templates, ids)
        tokenizer.without_template = folder if templates is None else None
        return tokenizer

    # ----------------------------------------------------------------------------------------------
    # Text to ids and back

    def encode(self, text, add_special_tokens=False, parse_special=False, parse_mask=True):
        """The ids of one str. add_special_tokens wraps them as the checkpoint does ([CLS] ...
        [SEP]); parse_special turns text that spells a special token into that token, as
        `transformers` does. With parse_mask=False the mask is excepted: its spelling stays text, as
        without parse_special."""
        return self.encode_batch([text], add_special_tokens, parse_special, parse_mask)[0]

    def encode_batch(self, texts, add_special_tokens=False, parse_special=False, parse_mask=True):
        """The ids of many texts, on all cores: list of list of int. ValueError for what is not
        Unicode text, and for a single one, whose letters would be taken for texts."""
        if isinstance(texts, str):
            raise ValueError("encode_batch takes a list of texts: encode takes one")
        texts = list(texts)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("only str can be encoded, one by one or in a list")
        if self._is_bytes and not parse_special:
            return [list(text.encode("utf-8")) for text in texts]
        if self._characters and not parse_special:      # the library would take 25 times as long
            return [self._encode_characters(text) for text in texts]
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

    def _encode_characters(self, text):
        try:
            return [self._characters[character] for character in text]
        except KeyError as error:
            known = "".join(sorted(self._characters))
            raise ValueError(f"this text cannot be encoded: the tokenizer has no "
                             f"{error.args[0]!r}, only {known}") from None

    def _encode(self, backend, texts, add_special_tokens, parse_special):
        try:
            with self._lock:
                backend.encode_special_tokens = not parse_special
                encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except Exception as error:  # noqa: BLE001  the library raises nothing narrower
            raise ValueError(f"this text cannot be encoded: {one_line(error)}") from None
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
        """The text of an iterable of ids. Ids that are no token (a padded embedding has some) are
        left out."""
        ids = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_answer(self, ids):
        """The text before the first special token."""
        added = self.backend.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special}
        return self.decode(itertools.takewhile(lambda token: token not in special, ids))

    def frame(self):
        """(head, tail): the ids that the checkpoint puts in front of a text and after it, as [CLS]
        and [SEP]; often none. An empty text would not tell which of them stand after it."""
        try:
            encoding = self.backend.encode("a", add_special_tokens=True)
        except Exception:  # noqa: BLE001  a vocabulary without "a" and [UNK]
            encoding = self.backend.encode("", add_special_tokens=True)
        added = [bool(flag) for flag in encoding.special_tokens_mask]
        ids = encoding.ids
        if all(added):
            ends = ids[-1:] == [self.eos_token_id]
            middle = len(ids) - 1 if ends else len(ids)
            return ids[:middle], ids[middle:]
        first = added.index(False)
        last = len(added) - added[::-1].index(False)
        return ids[:first], ids[last:]

    # ----------------------------------------------------------------------------------------------
    # Chat

    def render_chat(self, messages, add_generation_prompt=True, template="default", **variables):
        """The text of a conversation [{"role": "user", "content": "..."}, ...] in the checkpoint's
        own format.

        `variables` go to the template (tools=..., enable_thinking=...). ValueError when the
        template refuses the messages, reaches outside its sandbox or does not end."""
        self.note_missing_template()
        if template not in self.chat_templates:
            known = ", ".join(sorted(self.chat_templates))
            raise ValueError(f"no chat template called {template!r}; this tokenizer has {known}")
        variables = {"tools": None, "documents": None, **self.roles, **variables,
                     "messages": messages, "add_generation_prompt": add_generation_prompt}
        return render_template(self.chat_templates[template], variables)

    def apply_chat_template(self, messages, add_generation_prompt=True, template="default",
                            **variables):
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

    # ----------------------------------------------------------------------------------------------
    # Growing and saving

    def add_special_tokens(self, tokens):
        """Make each str a special token and return the ids; new ones come last, and the model must
        be resized."""
        added = [AddedToken(token, special=True, normalized=False) for token in tokens]
        self.backend.add_special_tokens(added)
        self._set_ids()
        return [self.backend.token_to_id(token) for token in tokens]

    def add_mask_token(self):
        """The id of the mask token, after adding `<|mask|>` where there is none."""
        if self.mask_token_id is None:
            self.roles["mask_token"] = MASK
            self.add_special_tokens([MASK])
        return self.mask_token_id

    def add_chat_tokens(self):
        """Make the tokens of our own chat template special, where it is used because the checkpoint
        brought none."""
        if self.chat_templates == {"default": CHAT_TEMPLATE}:
            self.add_special_tokens([IM_START, IM_END])
            self.has_chat_tokens = True

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json; from_pretrained and transformers'
        AutoTokenizer read them."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = self.backend.to_str(pretty=True)
        settings = self._settings()
        settings[MARKER] = _settings_hash(settings, vocabulary.encode())
        described = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        _write_whole(folder / "tokenizer.json", vocabulary)
        _write_whole(folder / "tokenizer_config.json", described)

    def _settings(self):
        """What stands in tokenizer_config.json, but for the marker."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # Its readers take false where it is not named, whatever tokenizer.json says.
            "add_prefix_space": getattr(self.backend.pre_tokenizer, "add_prefix_space", False),
        }
        for role in ("mask", "eos", "pad", "bos"):
            settings[f"{role}_token"] = self._text_of(getattr(self, f"{role}_token_id"))
        settings |= self.roles
        settings = {name: value for name, value in settings.items() if value is not None}
        if self.config_ids:
            settings["token_ids"] = self.config_ids
        # A checkpoint without a template stays one, unless it was prepared for ChatML: it does not
        # learn that by being copied.
        stands_in = self.without_template and self.chat_templates == {"default": CHAT_TEMPLATE}
        if self.has_chat_tokens or not stands_in:
            settings["chat_template"] = _described_templates(self.chat_templates)
        return settings


# --------------------------------------------------------------------------------------------------
# Files


def _described_templates(templates):
    """{name: jinja} as tokenizer_config.json has it: a text, or a list of named ones."""
    if list(templates) == ["default"]:
        return templates["default"]
    return [{"name": name, "template": text} for name, text in templates.items()]


def _settings_hash(settings, vocabulary):
    """A hash of what save_pretrained writes: settings, a dict, and the bytes of tokenizer.json."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + vocabulary).hexdigest()


def _write_whole(path, content):
    """Write a text, so that a kill at any moment leaves a whole file."""
    common.write_atomically(path, lambda temporary: Path(temporary).write_bytes(content.encode()))


def _read_own(folder):
    """(backend, roles, templates, ids) of a folder that save_pretrained wrote and nobody changed;
    None for any other."""
    try:
        vocabulary = (folder / "tokenizer.json").read_bytes()
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(settings, dict) or MARKER not in settings:
        return None
    if settings.pop(MARKER) != _settings_hash(settings, vocabulary):
        return None
    if any((folder / name).exists() for name in FILES_OF_OTHERS):
        return None
    roles = {name: text for name, text in settings.items() if name.endswith("_token")}
    templates = settings.get("chat_template")
    if isinstance(templates, str):
        templates = {"default": templates}
    elif templates is not None:
        templates = {entry["name"]: entry["template"] for entry in templates}
    return Backend.from_buffer(vocabulary), roles, templates, settings.get("token_ids")


def _read_published(folder):
    """(backend, roles, templates, ids) of any other folder. This is the only place where data/
    needs pretrained/: what is trained from scratch does without."""
    try:
        from pretrained.tokenizer_files import read_tokenizer
    except ModuleNotFoundError as error:
        if not error.name.startswith("pretrained"):
            raise
        raise ValueError(f"the tokenizer in {folder} is not as we saved it, and pretrained/, which "
                         "reads those of others, is missing") from None
    return read_tokenizer(folder)


# --------------------------------------------------------------------------------------------------
# Byte-level BPE


def check_vocab_size(vocab_size):
    """ValueError for a vocabulary that cannot hold the bytes and the special tokens, or is
    absurd."""
    smallest, largest = 256 + len(SPECIAL_TOKENS), 2**20
    if not smallest <= vocab_size <= largest:
        raise ValueError(f"vocab_size is {vocab_size:,}: take {smallest} (256 bytes and "
                         f"{len(SPECIAL_TOKENS)} special tokens) to {largest:,}")


def _byte_characters():
    """GPT-2's printable stand-in for each of the 256 bytes: itself if it prints, else the next
    character after 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _byte_vocab():
    return {character: byte for byte, character in enumerate(_byte_characters())}


def _character_vocab(backend):
    """{character: id} of a backend as Tokenizer.characters makes them, None for any other."""
    vocab = backend.get_vocab(with_added_tokens=False)
    plain = backend.normalizer is None and backend.post_processor is None
    if not (plain and isinstance(backend.model, models.WordLevel)):
        return None
    layout = json.loads(backend.to_str())
    splits = {"type": "Split", "pattern": {"Regex": ANY_CHARACTER}, "behavior": "Isolated",
              "invert": False}
    if layout["pre_tokenizer"] != splits or backend.model.unk_token in vocab:
        return None
    return vocab


def _byte_level(model):
    """Around a BPE model: GPT-2's split into words, bytes as characters. No normalizer:
    decode(encode(x)) == x."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_special_tokens(backend):
    """Added after training, so their ids are the last ones and no piece learned from text can be
    one of them."""
    tokens = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    backend.add_special_tokens(tokens)
    return backend


def _halves(piece, ranks):
    """The two pieces that BPE merged last to make this one: tiktoken has ranks only, tokenizer.json
    needs the pairs."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
