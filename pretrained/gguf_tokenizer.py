"""The tokenizer in a GGUF file: byte-level BPE, whose way of splitting text into words has a name.

The list of tokens, the merges, the special tokens and the chat template stand in the metadata. The
rule that splits text does not, only llama.cpp's name for it: PRE_TOKENIZERS has those whose rule is
known. Any other is refused: with a wrong rule most texts still look right, and numbers do not.
"""
import json
from typing import NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Backend

from common import write_atomically
from pretrained.gguf import read_header
from training.files import write_json

# Kinds of tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

# Qwen2 splits digits one by one and keeps a newline with what stands before it.
QWEN2_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_REGEX = QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")     # digits three by three
LING_REGEX = QWEN2_REGEX.replace(r"\s*[\r\n]+|", r"\s*[\r\n]|")     # newlines one by one
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION_REGEX = r"[\p{P}\$\+<=>\^~\|]+"


class PreTokenizer(NamedTuple):
    """How text is split before BPE, and what goes with it."""
    splits: list                    # regular expressions, each applied to the pieces of the former
    nfc: bool = False               # compose characters first
    ignore_merges: bool = False     # a word that is a token is taken whole
    adds_bos: bool = False          # unless the metadata say otherwise


LLAMA3 = PreTokenizer([LLAMA3_REGEX], ignore_merges=True, adds_bos=True)
LING = PreTokenizer([LING_REGEX], nfc=True)
PRE_TOKENIZERS = {
    "smollm": PreTokenizer([r"\p{N}", GPT2_REGEX]),
    "qwen2": PreTokenizer([QWEN2_REGEX], nfc=True),     # Qwen2, Qwen2.5, Qwen3, Dream
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "gpt-2": PreTokenizer([GPT2_REGEX]),
    "bailingmoe": LING,                                 # Ling's tokenizer, which LLaDA has too
    "bailingmoe2": LING,
    "llada-moe": LING,
    "default": PreTokenizer([PUNCTUATION_REGEX, GPT2_REGEX, r"\p{N}+", "[0-9][0-9][0-9]"]),
}

# Role -> key of its id
ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}
TEMPLATE = "tokenizer.chat_template"


def read_tokenizer(file):
    """(backend of the `tokenizers` library, {"bos_token": its text}, {"default": jinja text} or
    None, {"mask_token_id": id}) of a GGUF file. Raises ValueError."""
    metadata = read_header(file).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"{file} has a tokenizer of the kind {kind!r}; only byte-level BPE "
                         "('gpt2') is read")
    name = metadata.get("tokenizer.ggml.pre")
    if name not in list(PRE_TOKENIZERS):                # a list: it may be of another type
        raise ValueError(f"{file} splits text by the rule {name!r}, which is not known here (only "
                         f"{', '.join(PRE_TOKENIZERS)})")
    if metadata.get("tokenizer.ggml.add_space_prefix", False) is not False:
        raise ValueError(f"{file} puts a space in front of a text, which is not supported here")
    tokens, kinds = read_tokens(file, metadata)
    backend = make_backend(file, metadata, PRE_TOKENIZERS[name], tokens, kinds)
    roles = read_roles(file, metadata, tokens, kinds)
    set_frame(file, backend, metadata, PRE_TOKENIZERS[name], roles)
    ids = {f"{role}_id": metadata[key] for role, key in ROLES.items()
           if key in metadata and role != "unk_token"}
    return backend, roles, read_templates(file, metadata), ids


def read_tokens(file, metadata):
    """(the tokens' texts, their kinds), a list each. Raises ValueError."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not is_list_of(tokens, str) or not tokens:
        raise ValueError(f"{file} has no list of tokens")
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not is_list_of(kinds, int) or len(kinds) != len(tokens):
        raise ValueError(f"{file} is damaged: {len(tokens)} tokens, and not as many kinds of them")
    return tokens, kinds


def is_list_of(values, kind):
    return isinstance(values, list) and all(type(value) is kind for value in values)


def make_backend(file, metadata, rule, tokens, kinds):
    """The `tokenizers` object without what it puts around a text. Raises ValueError."""
    vocab, added, count = {}, [], len(tokens)
    while count and kinds[count - 1] == UNUSED:         # "[PAD151936]": they fill an embedding
        count -= 1
    for index, (token, kind) in enumerate(zip(tokens[:count], kinds)):
        if token in vocab:
            raise ValueError(f"{file} is damaged: it has the token {token!r:.80} twice")
        vocab[token] = index
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            added.append(AddedToken(token, special=kind != USER_DEFINED, normalized=False))
    merges = metadata.get("tokenizer.ggml.merges")
    if not is_list_of(merges, str):
        raise ValueError(f"{file} has no list of merges")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=pairs, ignore_merges=rule.ignore_merges))
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged: its merges are no BPE ({reason:.200})") from None
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rule.splits]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return backend


def read_roles(file, metadata, tokens, kinds):
    """{"bos_token": its text, ...}. ValueError for an id outside the list of tokens."""
    roles = {}
    for role, key in ROLES.items():
        index = metadata.get(key)
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise ValueError(f"{file} is damaged: {key} is {index!r}, it has {len(tokens)} tokens")
        if kinds[index] != UNUSED:
            roles[role] = tokens[index]
    return roles


def set_frame(file, backend, metadata, rule, roles):
    """Let the backend put BOS and EOS around a text where the file asks for it."""
    wanted = {"bos_token": metadata.get("tokenizer.ggml.add_bos_token", rule.adds_bos),
              "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False)}
    used = {role: roles.get(role) for role, is_wanted in wanted.items() if is_wanted}
    for role, token in used.items():
        if token is None:
            raise ValueError(f"{file} puts {role} around a text, but has none")
    if not used:
        return
    head = [f"{used['bos_token']}:0"] if "bos_token" in used else []
    tail = [f"{used['eos_token']}:0"] if "eos_token" in used else []
    special = [(token, backend.token_to_id(token)) for token in set(used.values())]
    backend.post_processor = processors.TemplateProcessing(
        single=[*head, "$A:0", *tail], pair=[*head, "$A:0", *tail, *head, "$B:0", *tail],
        special_tokens=special)


def read_templates(file, metadata):
    """{"default": jinja text, ...}; None: the file brings none. Raises ValueError."""
    templates = {}
    for key, value in metadata.items():
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}."):
            if not isinstance(value, str):
                raise ValueError(f"{file}: {key} is not a text")
            name = key.removeprefix(TEMPLATE).removeprefix(".")
            templates[name or "default"] = value
    return templates or None


def write_tokenizer(file, folder):
    """Write a GGUF's tokenizer as tokenizer.json and tokenizer_config.json, which `transformers`
    and data.tokenizer read. Raises ValueError or OSError."""
    backend, roles, templates, _ = read_tokenizer(file)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False,
                "clean_up_tokenization_spaces": False, **roles}
    if templates is not None:
        settings["chat_template"] = [{"name": name, "template": text}
                                     for name, text in templates.items()]
        if list(templates) == ["default"]:
            settings["chat_template"] = templates["default"]
    write_atomically(folder / "tokenizer.json", backend.save)
    write_json(folder / "tokenizer_config.json", settings)


# --------------------------------------------------------------------------------------------------
# Write


def describe_tokenizer(backend, roles, templates, size, architecture):
    """{key: value} of a tokenizer for a GGUF: what `read_tokenizer` reads. size: of the model's
    vocabulary, which unused tokens fill. Raises ValueError for anything but byte-level BPE that
    splits text by one of PRE_TOKENIZERS."""
    layout = json.loads(backend.to_str())
    model = layout["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"its tokenizer is of the kind {model['type']!r}; only byte-level BPE can "
                         "be written")
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    for token, index in model["vocab"].items():
        put_token(tokens, kinds, index, token, NORMAL)
    for added in layout["added_tokens"]:
        kind = CONTROL if added["special"] else USER_DEFINED
        put_token(tokens, kinds, added["id"], added["content"], kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule_of(layout, architecture),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_space_prefix": False,
    }
    for role, key in ROLES.items():
        if roles.get(role) is not None:
            metadata[key] = backend.token_to_id(roles[role])
    metadata |= frame_of(backend, roles)
    for name, text in (templates or {}).items():
        metadata[TEMPLATE if name == "default" else f"{TEMPLATE}.{name}"] = text
    return metadata


def put_token(tokens, kinds, index, token, kind):
    if index >= len(tokens):
        raise ValueError(f"its tokenizer has the token {token!r:.80} at {index}, the model only "
                         f"{len(tokens)} rows")
    tokens[index], kinds[index] = token, kind


def rule_of(layout, architecture):
    """The name in PRE_TOKENIZERS of how a tokenizer splits text. ValueError where it has none."""
    first = layout["pre_tokenizer"] or {}
    splits = []
    for part in first.get("pretokenizers", [first]):
        splits += splits_of(part)
    normalizer = layout["normalizer"]
    nfc = normalizer == {"type": "NFC"}
    wanted = PreTokenizer(splits, nfc, layout["model"].get("ignore_merges", False))
    names = []
    for name, rule in PRE_TOKENIZERS.items():
        if rule._replace(adds_bos=False) == wanted and (nfc or normalizer is None):
            names.append(name)
    if not names:
        raise ValueError("its tokenizer splits text by a rule that has no name in llama.cpp which "
                         "is known here")
    return architecture if architecture in names else names[0]


def splits_of(part):
    """The regular expressions by which a part of a pre-tokenizer splits. Raises ValueError."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return [GPT2_REGEX] if part["use_regex"] else []
    if kind == "Digits":
        return [r"\p{N}" if part["individual_digits"] else r"\p{N}+"]
    is_plain = kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]
    if is_plain and "Regex" in part["pattern"]:
        return [part["pattern"]["Regex"]]
    raise ValueError(f"its tokenizer splits text by {kind}, which a GGUF cannot say")


def frame_of(backend, roles):
    """What the tokenizer puts around a text: whether it begins with BOS and ends with EOS. Raises
    ValueError for anything else."""
    around = backend.encode("a").tokens
    inside = backend.encode("a", add_special_tokens=False).tokens
    framed = {}
    for role in ("bos_token", "eos_token"):
        framed[role] = bool(around) and roles.get(role) == around[0 if role == "bos_token" else -1]
    begin = [roles["bos_token"]] if framed["bos_token"] else []
    end = [roles["eos_token"]] if framed["eos_token"] else []
    if begin + inside + end != around:
        raise ValueError(f"its tokenizer puts {around} around a text, which a GGUF cannot say")
    return {"tokenizer.ggml.add_bos_token": framed["bos_token"],
            "tokenizer.ggml.add_eos_token": framed["eos_token"]}
