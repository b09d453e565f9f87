"""The tokenizer files of published checkpoints: tokenizer.json, or the older vocab.txt or
vocab.json + merges.txt, and the config files that stand around them; or the tokenizer in a GGUF.

`read_tokenizer` gives the object of the `tokenizers` library that encodes as `transformers` would,
BOS and EOS included, and what a data.tokenizer.Tokenizer needs beside it. What cannot be followed
is a ValueError, never read as something else.
"""
import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from pretrained import gguf_tokenizer
from pretrained.gguf import is_gguf
from pretrained.gguf_tokenizer import QWEN2_REGEX

# What `tokenizer_class` (without its "TokenizerFast") or else `model_type` says of how text is
# split.
FAMILIES = {
    "bert": "bert",
    "distilbert": "bert",
    "roberta": "roberta",
    "gpt2": "gpt2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "dream": "qwen2",
}

END_OF_TEXT = "<|endoftext|>"       # GPT-2's, and of many after it
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The special tokens a family has unless its files say otherwise (bert-base-uncased's files are
# silent on [MASK]).
FAMILY_ROLES = {
    "bert": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
             "mask_token": "[MASK]"},
    "roberta": {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
                "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
    "gpt2": {"unk_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT},
    "qwen2": {"unk_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
}


class Framing(NamedTuple):
    """How a class of `transformers` puts BOS and EOS around a text, whatever tokenizer.json says.
    EOS comes only where tokenizer_config.json asks for it."""
    bos: str
    eos: str
    adds_bos: bool      # unless tokenizer_config.json says otherwise


# Some classes of `transformers` change what tokenizer.json says, by tokenizer_config.json or by a
# default of their own. These put BOS and EOS around a text:
FRAMING = {
    "Llama": Framing("<s>", "</s>", True),
    "CodeLlama": Framing("<s>", "</s>", True),
    "Gemma": Framing("<bos>", "<eos>", True),
    "Cohere": Framing("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", True),
    "GPTNeoX": Framing(END_OF_TEXT, END_OF_TEXT, False),
}
# These set the lower case and the accents of BERT's normalizer.
NORMALIZING = ("Bert", "DistilBert", "Electra", "ConvBert", "Funnel", "LayoutLM", "Lxmert",
               "MobileBert", "SqueezeBert", "MPNet", "Splinter")
# These do neither: they read tokenizer.json as it is, but for `add_prefix_space`.
PLAIN = ("PreTrained", "GPT2", "Qwen2", "Roberta", "Bart", "Longformer", "Deberta", "Whisper",
         "XLMRoberta", "Bloom", "T5")
# The class (without its "TokenizerFast") of a checkpoint that names none.
CLASS_OF_MODEL = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
    "gpt2": "GPT2",
    "bert": "Bert",
    "distilbert": "DistilBert",
    "roberta": "Roberta",
    "modernbert": "PreTrained",
}
FLAGS = ("add_bos_token", "add_eos_token", "do_lower_case", "strip_accents",
         "tokenize_chinese_chars", "add_prefix_space")


class Published(NamedTuple):
    """What the files of a folder say."""
    backend: Backend        # of the `tokenizers` library
    roles: dict             # {"mask_token": "[MASK]"}; only tokens that the backend has
    templates: dict | None  # {"default": jinja text, ...}; None: it brings none
    ids: dict               # {"mask_token_id": 103}: what config.json says


def read_tokenizer(folder):
    """The Published tokenizer in a folder: from tokenizer.json, or else vocab.txt (BERT) or
    vocab.json + merges.txt (GPT-2, RoBERTa, Qwen2, Dream); special tokens and templates from the
    config files beside it. Or the one in a GGUF file. FileNotFoundError when there is none of
    these, ValueError naming the file that is damaged."""
    folder = Path(folder)
    if is_gguf(folder):
        return Published(*gguf_tokenizer.read_tokenizer(folder))
    settings = read_json(folder / "tokenizer_config.json")
    config = read_json(folder / "generation_config.json") | read_json(folder / "config.json")
    family = find_family(settings, config)
    roles = read_roles(folder, settings, family)
    backend = load_backend(folder, settings, family, roles)
    backend.no_truncation()     # a tokenizer.json may carry the limits of whoever saved it
    backend.no_padding()
    add_declared_tokens(backend, folder, settings, family, roles)
    follow_settings(backend, folder / "tokenizer_config.json", settings, config, roles)
    known = {role: token for role, token in roles.items()
             if backend.token_to_id(token) is not None}
    templates = read_chat_templates(folder, settings)
    return Published(backend, known, templates, read_config_ids(config, folder))


# --------------------------------------------------------------------------------------------------
# Files


def one_line(error):
    """An error's message, or any text, on one line of 300 characters at most."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_text(path):
    """The text of a file. ValueError naming it if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None


def read_json(path):
    """The object in a JSON file, {} when the file does not exist, ValueError naming it when it is
    damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def find_family(settings, config):
    """The family in FAMILIES that the files name, or None."""
    for name in (settings.get("tokenizer_class"), config.get("model_type")):
        name = str(name).removesuffix("Fast").removesuffix("Tokenizer").lower()
        name = name.removeprefix("a2d-")
        if name in FAMILIES:
            return FAMILIES[name]
    return None


def find_class(settings, config):
    """The class that the files name, or that their model type has, "Llama" for LlamaTokenizerFast;
    None: neither is known."""
    for named in (settings.get("tokenizer_class"), config.get("tokenizer_class")):
        if isinstance(named, str):
            return named.removesuffix("Fast").removesuffix("Tokenizer")
    return CLASS_OF_MODEL.get(config.get("model_type"))


def read_roles(folder, settings, family):
    """{"mask_token": "[MASK]", ...}: the family's, overruled by special_tokens_map.json, overruled
    by tokenizer_config.json. An explicit null says: none."""
    roles = dict(FAMILY_ROLES.get(family, {}))
    map_path = folder / "special_tokens_map.json"
    sources = {map_path: read_json(map_path), folder / "tokenizer_config.json": settings}
    for path, values in sources.items():
        for role, value in values.items():
            if role in ROLES:
                roles[role] = parse_token(value, path)[0] if value else None
    return {role: token for role, token in roles.items() if token}


def parse_token(value, path):
    """(text, flags) of a token as config files write it: a str, or a dict with "content" and
    AddedToken's flags."""
    flags = {}
    if isinstance(value, dict):
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            if isinstance(value.get(name), bool):
                flags[name] = value[name]
        value = value.get("content")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path} has a special token that is not a string: "
                         f"{one_line(repr(value))}")
    return value, flags


def read_config_ids(config, folder):
    """mask_token_id and its like from config.json. A list of end tokens (Llama 3) gives its first:
    the model's config keeps them all."""
    ids = {}
    for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        value = config.get(name)
        if isinstance(value, list) and (len(value) == 1 or value and name == "eos_token_id"):
            value = next((token for token in value if token not in (None, -1)), None)
        if value is None or value == -1:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{folder}: {name} in the config should be a token id, not "
                             f"{one_line(repr(value))}")
        ids[name] = value
    return ids


def read_chat_templates(folder, settings):
    """{"default": jinja text, ...} from chat_template.jinja, else chat_template.json, else
    tokenizer_config.json; None where there is none."""
    if (folder / "chat_template.jinja").is_file():
        return {"default": read_text(folder / "chat_template.jinja")}
    path = folder / "chat_template.json"
    value = read_json(path).get("chat_template")
    if value is None:
        path = folder / "tokenizer_config.json"
        value = settings.get("chat_template")
    if value is None:
        return None
    if isinstance(value, str):
        return {"default": value}
    # Some checkpoints have several: [{"name": "default", "template": "..."}, {"name": "tool_use",
    # "template": "..."}]
    templates = {}
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        named = entry if isinstance(entry, dict) else {}
        name, text = named.get("name"), named.get("template")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"{path}: chat_template is neither a text nor a list of named texts")
        templates[name] = text
    return templates


# --------------------------------------------------------------------------------------------------
# The vocabulary


def load_backend(folder, settings, family, roles):
    """The `tokenizers` object of a folder, from the first kind of file that it has."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
    has = sorted(name for name in names if (folder / name).is_file())
    try:
        if "tokenizer.json" in has:
            return Backend.from_file(str(folder / "tokenizer.json"))
        if "vocab.txt" in has:
            return wordpiece(folder / "vocab.txt", settings, roles)
        if "vocab.json" in has and "merges.txt" in has:
            return byte_level_bpe(folder, settings, family, roles)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        raise ValueError(f"{folder}: {', '.join(has)} cannot be read as a tokenizer: "
                         f"{one_line(error)}") from None
    if (folder / "tokenizer.model").is_file():
        raise ValueError(f"{folder} has only tokenizer.model (sentencepiece): write a "
                         "tokenizer.json once, with `transformers`: "
                         "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
    raise FileNotFoundError(f"no tokenizer in {folder}: looked for tokenizer.json, vocab.txt, "
                            "and vocab.json with merges.txt")


def wordpiece(path, settings, roles):
    """BERT: words, then the longest pieces of a vocabulary that has one token a line."""
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    vocab = {token: i for i, token in enumerate(lines)}
    unk, cls, sep = (roles.get(role, "") for role in ("unk_token", "cls_token", "sep_token"))
    for token in (unk, cls, sep):
        if token not in vocab:
            raise ValueError(f"{path} has no token {token!r}, which a WordPiece tokenizer needs")
    backend = Backend(models.WordPiece(vocab, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0", pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])])
    return backend


def byte_level_bpe(folder, settings, family, roles):
    """GPT-2, RoBERTa and Qwen2 (Dream): byte-level BPE, each with its way to split words and its
    frame of tokens."""
    if family not in ("gpt2", "roberta", "qwen2"):
        raise ValueError(f"{folder} has vocab.json and merges.txt, but neither config.json nor "
                         "tokenizer_config.json says that it is gpt2, roberta, qwen2, qwen3 or "
                         "dream: save it once with a tokenizer.json")
    vocab = read_json(folder / "vocab.json")
    backend = Backend(models.BPE(vocab=vocab, merges=read_merges(folder / "merges.txt")))
    backend.decoder = decoders.ByteLevel()
    prefix_space = settings.get("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if family == "roberta":
        sep, cls = roles["sep_token"], roles["cls_token"]
        backend.post_processor = processors.RobertaProcessing(
            (sep, vocab[sep]), (cls, vocab[cls]), add_prefix_space=prefix_space)
    if family == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)])
    return backend


def read_merges(path):
    """[(left, right)] of a merges.txt. Only its first line may be a comment: "# version" further
    down may well be a merge."""
    lines = read_text(path).split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [tuple(line.split(" ")) for line in lines if line.strip()]


# --------------------------------------------------------------------------------------------------
# Added tokens


def add_declared_tokens(backend, folder, settings, family, roles):
    """Tell the backend of the tokens that only the config files declare, and check the ids of those
    it knows."""
    declared = read_added_tokens(folder, settings, roles)                # [(id, AddedToken)]
    present = backend.get_added_tokens_decoder()
    known = {token.content for token in present.values()}
    known |= {token.content for _, token in declared}
    guesses = FAMILY_ROLES.get(family, {}).values()
    for text in dict.fromkeys([*roles.values(), *extra_tokens(folder, settings)]):
        # A family's default is a guess: it must not grow the vocabulary of a checkpoint that has no
        # such token.
        only_guessed = text in guesses and backend.token_to_id(text) is None
        if text in known or only_guessed:
            continue
        # RoBERTa's mask takes the space before it: "a <mask>" has no token " ".
        swallows_space = family == "roberta" and text == roles.get("mask_token")
        token = AddedToken(text, special=True, normalized=False, lstrip=swallows_space)
        declared.append((None, token))
    for index, token in declared:
        if present.get(index) != token:
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([token])
        found = backend.token_to_id(token.content)
        if index is not None and found != index:
            raise ValueError(f"{folder}: {token.content!r} is token {index} by the config, {found} "
                             "by the vocabulary")


def extra_tokens(folder, settings):
    """Special tokens without a role, under the two names that `transformers` gives them."""
    path = folder / "tokenizer_config.json"
    texts = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = settings.get(name) or []
        if isinstance(values, dict):
            values = list(values.values())
        if not isinstance(values, list):
            raise ValueError(f"{path}: {name} should be a list of tokens")
        texts += [parse_token(value, path)[0] for value in values]
    return texts


def read_added_tokens(folder, settings, roles):
    """[(id, AddedToken)] in the order of ids, from `added_tokens_decoder` or the older
    added_tokens.json."""
    path = folder / "tokenizer_config.json"
    entries = settings.get("added_tokens_decoder")
    if not entries:
        path = folder / "added_tokens.json"
        entries = {}
        for text, index in read_json(path).items():
            special = text in roles.values()
            entries[index] = {"content": text, "special": special, "normalized": not special}
    tokens = []
    try:
        for index, value in entries.items():
            text, flags = parse_token(value, path)
            tokens.append((int(index), AddedToken(text, **flags)))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged added tokens: {one_line(error)}") from None
    return sorted(tokens, key=lambda entry: entry[0])


# --------------------------------------------------------------------------------------------------
# What the classes of `transformers` do to tokenizer.json


def follow_settings(backend, path, settings, config, roles):
    """Change the backend as that class does by which `transformers` reads the folder: BOS and EOS,
    lower case and accents, a space in front of a text. `path` is that of tokenizer_config.json.
    ValueError for what cannot be followed."""
    name = find_class(settings, config)
    flags = {}
    for key in FLAGS:
        value = settings.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{path}: {key} should be true or false, not {one_line(repr(value))}")
        flags[key] = value
    has_tokenizer_json = path.with_name("tokenizer.json").is_file()
    if name in FRAMING:
        set_frame(backend, path, settings, FRAMING[name], roles)
    elif name == "GPT2" and flags["add_bos_token"] and not has_tokenizer_json:
        # OPT: this class adds BOS, never EOS, where it has only vocab.json and merges.txt.
        without_eos = {**settings, "add_eos_token": False}
        set_frame(backend, path, without_eos, Framing(END_OF_TEXT, END_OF_TEXT, False), roles)
    elif name in NORMALIZING:
        set_normalizer(backend, path, flags, name)
    elif name not in PLAIN:
        check_unknown_class(backend, path, flags, settings.get("tokenizer_class"), roles)
    set_prefix_space(backend, path, flags["add_prefix_space"], name)


def state(component):
    """The settings of a part of the backend, as tokenizer.json has them; {} for none."""
    return {} if component is None else json.loads(component.__getstate__())


def set_frame(backend, path, settings, framing, roles):
    """The classes of FRAMING replace what tokenizer.json puts around a text by BOS and EOS, each if
    it is wanted."""
    used = {}                                   # {"bos_token": its text}
    defaults = {"bos_token": (framing.bos, framing.adds_bos), "eos_token": (framing.eos, False)}
    for role, (default, wanted) in defaults.items():
        if role not in settings:
            roles.setdefault(role, default)
        if not settings.get(f"add_{role}", wanted):
            continue
        token = roles.get(role)
        if token is None or backend.token_to_id(token) is None:
            if f"add_{role}" in settings:
                raise ValueError(f"{path}: add_{role} is true, but {role} is {token!r}, which the "
                                 "tokenizer has not")
            return              # only a default asks for it, and this vocabulary is of another kind
        used[role] = token
    head = [f"{used['bos_token']}:0"] if "bos_token" in used else []
    tail = [f"{used['eos_token']}:0"] if "eos_token" in used else []
    first, second = [*head, "$A:0", *tail], [*head, "$B:0", *tail]
    tokens = [(token, backend.token_to_id(token)) for token in set(used.values())]
    backend.post_processor = processors.TemplateProcessing(
        single=first, pair=first + second, special_tokens=tokens)


def set_normalizer(backend, path, flags, name):
    """The classes of NORMALIZING set what BERT's normalizer does; any other they leave as it is."""
    stored = state(backend.normalizer)
    if not stored and (flags["do_lower_case"] or flags["strip_accents"]):
        raise ValueError(f"{path} asks for lower case or no accents, but tokenizer.json has no "
                         "normalizer: correct one of them")
    if stored.get("type") != "BertNormalizer":
        return
    chinese = flags["tokenize_chinese_chars"] is not False
    if name in ("MPNet", "Splinter"):
        chinese = stored["handle_chinese_chars"]
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=stored["clean_text"], handle_chinese_chars=chinese,
        strip_accents=flags["strip_accents"], lowercase=flags["do_lower_case"] is not False)


def set_prefix_space(backend, path, wanted, name):
    """Every class sets `add_prefix_space` of the pre-tokenizer, if that is ByteLevel and not one
    part of several; false where tokenizer_config.json is silent. Llama and T5 would convert
    tokenizer.model instead, which is not read here."""
    if name in ("Llama", "T5"):
        if wanted is not None and wanted != prefixes_space(backend):
            raise ValueError(f"{path}: add_prefix_space is {str(wanted).lower()}, but "
                             "tokenizer.json does otherwise: correct one of them")
        return
    stored = state(backend.pre_tokenizer)
    if wanted is None and name is not None:
        wanted = False
    if name in ("Bloom", "Cohere") and wanted and '"add_prefix_space": false' in json.dumps(stored):
        raise ValueError(f"{path}: add_prefix_space is true and tokenizer.json says false: correct "
                         "one of them")
    if wanted is not None and stored.get("type") == "ByteLevel":
        del stored["type"]
        stored["add_prefix_space"] = wanted
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(**stored)


def prefixes_space(backend):
    """Whether a text is read as if it began with a space."""
    text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
    if backend.pre_tokenizer is not None:
        pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        text = pieces[0][0] if pieces else ""
    return text[:1] in (" ", "\u2581", "\u0120")  # a space, Llama's and GPT-2's sign for one


def check_unknown_class(backend, path, flags, named, roles):
    """ValueError if the settings of a class that is not known here contradict tokenizer.json."""
    adds_bos, adds_eos = frames(backend, roles)
    does = {"add_bos_token": adds_bos, "add_eos_token": adds_eos,
            "do_lower_case": state(backend.normalizer).get("lowercase")}
    for key, value in does.items():
        if value is not None and flags[key] not in (None, value):
            raise ValueError(f"{path}: {key} is {str(flags[key]).lower()}, tokenizer.json does "
                             f"otherwise, and what tokenizer_class {named!r} makes of that is not "
                             "known here: correct one of them")


def frames(backend, roles):
    """(whether the backend puts tokens in front of a text, whether after it)."""
    try:
        encoding = backend.encode("a", add_special_tokens=True)
    except Exception:  # noqa: BLE001  a vocabulary without "a" and [UNK]
        encoding = backend.encode("", add_special_tokens=True)
    added = [bool(flag) for flag in encoding.special_tokens_mask]
    if not all(added):
        return added[0], added[-1]
    end = roles.get("eos_token", roles.get("sep_token"))
    has_tail = encoding.tokens[-1:] == [end]
    return len(added) > int(has_tail), has_tail
