"""data/tokenizer.py: exact round trips, and the ids and chats of `transformers` for every kind of
checkpoint."""

import json
import random
import sys

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from data.templates import render_template
from data.tokenizer import CHAT_TEMPLATE, MARKER, SPECIAL_TOKENS, Tokenizer

transformers = pytest.importorskip("transformers")

WORDS = (
    "the quick brown fox jumps over lazy dogs; don't they'll we've naïve café Ünïcödé "
    "中文 字符 日本語 def f(x): return x + 1\n"
)
CORPUS = [WORDS * 20, "    indented\n\n\tcode = 12345 + 6789\n" * 20]
TRICKY = [
    "", " ", "  ", "\n", "\n\n \n", "\t\tx", " lead", "trail ", "  two  spaces  ", "a\r\nb",
    "\x00\x01", "Hello, World!", "don't we'll I'M", "3.14159 1234567890", "naïve café ÀÉÎ",
    "e\u0301 vs é", "🙂👨‍👩‍👧‍👦 emoji", "ﬁ ligature ½ ² Ⅳ", "ا لعربية עברית", "a" * 300,
    "x\u2028y\u2029z", "def f(x):\n    return x**2  # ok\n", "<|endoftext|>",
    "a<|mask|>b <mask> c[MASK]d", "<s> x </s>", "[CLS] x [SEP]",
    "<|im_start|>user\nhi<|im_end|>", "\u200b\ufeff", "中文字符 日本語",
]



def random_text(seed, length=40):
    """Characters from all planes, surrogates aside, with much ASCII and whitespace in between."""
    rng = random.Random(seed)
    ranges = [
        (32, 127),
        (9, 14),
        (0x80, 0x250),
        (0x300, 0x370),
        (0x4E00, 0x9FFF),
        (0xE000, 0xFFFF),
        (0x10000, 0x10FFFF),
    ]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(length)))


TEXTS = TRICKY + [random_text(seed) for seed in range(200)]


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(CORPUS, vocab_size=340)


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def ours(request, bpe):
    return bpe if request.param == "bpe" else Tokenizer.bytes()


# --------------------------------------------------------------------------------------------------
# Our own


def test_round_trip(ours):
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert all(0 <= i < ours.vocab_size for i in ids)
        # text never becomes a control token
        assert not {ours.mask_token_id, ours.eos_token_id} & set(ids)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


def test_special_tokens(ours):
    ids = ours.encode("a<|mask|>b<|endoftext|>", parse_special=True)
    assert ids == [*ours.encode("a"), ours.mask_token_id, *ours.encode("b"), ours.eos_token_id]
    assert ours.decode(ids) == "a<|mask|>b<|endoftext|>"
    assert ours.decode(ids, skip_special_tokens=True) == "ab"
    assert ours.mask_token == "<|mask|>"
    assert ours.eos_token_id == ours.pad_token_id == ours.bos_token_id == ours.vocab_size - 4
    last = range(ours.vocab_size - 4, ours.vocab_size)
    assert [ours.backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(last)
    assert ours.add_mask_token() == ours.mask_token_id == ours.vocab_size - 3


def test_a_single_text_is_not_taken_for_many_of_a_letter():
    with pytest.raises(ValueError, match="learns from a list of texts"):
        Tokenizer.train("once upon a time " * 99, 300)
    with pytest.raises(ValueError, match="encode_batch takes a list of texts: encode takes one"):
        Tokenizer.bytes().encode_batch("once")


def test_training_counts_all_ids(bpe):
    assert bpe.vocab_size == 340
    # the same every time
    assert Tokenizer.train(CORPUS, vocab_size=340).backend.to_str() == bpe.backend.to_str()
    assert len(bpe.encode(WORDS)) < len(WORDS.encode()) / 2
    tiny = Tokenizer.train(
        ["<|endoftext|><|mask|>" * 1000], vocab_size=1000
    )  # spelled in the corpus, never learned as a piece
    assert tiny.vocab_size < 1000 and len(tiny.encode("<|mask|>")) > 1
    for size in (259, 10**12):
        with pytest.raises(ValueError, match="260"):
            Tokenizer.train(CORPUS, vocab_size=size)


def test_bytes():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.vocab_size == 260
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode("utf-8"))
        assert tokenizer.backend.encode(text.replace("<|", "<").replace("|>", ">")).ids == list(
            text.replace("<|", "<").replace("|>", ">").encode("utf-8")
        )  # the library agrees with the short cut


def test_save_and_load(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    for name in ("vocab_size", "mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id",
                 "mask_token", "roles", "chat_templates"):
        assert getattr(again, name) == getattr(ours, name), name
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(hf, name) == getattr(ours, name)
    for text in TEXTS:
        for parse in (False, True):
            ids = ours.encode(text, parse_special=parse)
            assert again.encode(text, parse_special=parse) == ids
            assert hf.encode(text, add_special_tokens=False, split_special_tokens=not parse) == ids
        assert hf.decode(ids) == again.decode(ids) == text
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes\n"}]
    assert (hf.apply_chat_template(chat, add_generation_prompt=True)
            == again.apply_chat_template(chat) == ours.apply_chat_template(chat))
    again.save_pretrained(tmp_path / "twice")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_what_we_saved_is_read_without_pretrained(ours, tmp_path, monkeypatch):
    """So a recipe needs data/, not pretrained/. What was changed since is no longer ours."""
    ours.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "pretrained.tokenizer_files", None)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    assert (again.roles, again.chat_templates) == (ours.roles, ours.chat_templates)
    assert again.without_template is None
    (tmp_path / "chat_template.jinja").write_text("other")
    with pytest.raises(ValueError, match="not as we saved it, and pretrained/"):
        Tokenizer.from_pretrained(tmp_path)
    monkeypatch.undo()
    assert Tokenizer.from_pretrained(tmp_path).chat_templates == {"default": "other"}
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", settings | {"eos_token": "<|im_end|>"})
    assert Tokenizer.from_pretrained(tmp_path).eos_token_id == ours.vocab_size - 1


def test_what_we_saved_before_there_was_a_marker_is_read_as_well(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings[MARKER]
    write_json(tmp_path / "tokenizer_config.json", settings)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.roles, again.chat_templates) == (ours.roles, ours.chat_templates)
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)


def test_an_id_outside_the_vocabulary_is_saved(tmp_path):
    """A model may mask with a row of its embedding that the tokenizer has no token for."""
    tokenizer = Tokenizer(Tokenizer.bytes().backend, {}, config_ids={"mask_token_id": 300})
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.mask_token_id, again.mask_token, again.roles) == (300, None, {})


def test_from_tiktoken_ranks(bpe):
    """A tokenizer.json written from tiktoken's ranks gives tiktoken's ids: so does GPT-2's, which
    needs a download."""
    import tiktoken

    stand_in = {character: byte for byte, character in enumerate(_stand_ins())}
    vocab = bpe.backend.get_vocab(with_added_tokens=False)
    ranks = {bytes(stand_in[c] for c in piece): i for piece, i in vocab.items()}
    # GPT-2's, as tiktoken has it
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    reference = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.from_ranks(ranks)
    assert tokenizer.vocab_size == len(ranks) + 4 == bpe.vocab_size
    for text in [*TEXTS, *CORPUS]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text)


def _stand_ins():
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


def test_gpt2_off_line(monkeypatch):
    import tiktoken

    def unreachable(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ConnectionError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


@pytest.mark.parametrize("bad", ["\ud800", 5, None, b"x"])
def test_not_text(ours, bad):
    with pytest.raises(ValueError):
        ours.encode(bad)


def test_decode_leaves_out_what_is_no_token(ours):
    assert ours.decode([-1, *ours.encode("ok"), 10**6]) == "ok"


# --------------------------------------------------------------------------------------------------
# Checkpoints of others


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def wordpiece_folder(folder, **settings):
    characters = sorted(set("".join(CORPUS + TRICKY)) - set(" \t\n\r\x00\x01"))
    vocab = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters,
             *("##" + c for c in characters), "the", "quick", "cafe", "café", "##ing", "hello",
             "mask", "mixed"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocab)) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", {"model_type": "bert", "pad_token_id": 0})
    return folder


def bpe_folder(folder, bpe, first=(), last=(), model_type="gpt2", **settings):
    """vocab.json and merges.txt, with tokens put in front of the pieces (RoBERTa) and after
    (GPT-2)."""
    bpe.backend.model.save(str(folder))
    vocab = bpe.backend.get_vocab(with_added_tokens=False)
    tokens = [*first, *sorted(vocab, key=vocab.get), *last]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", {"model_type": model_type})
    return folder


def assert_same(ours, hf, roles=("mask", "eos", "pad", "bos")):
    assert ours.vocab_size == len(hf)
    for role in roles:
        assert getattr(ours, f"{role}_token_id") == getattr(hf, f"{role}_token_id"), role
    for text in TEXTS:
        for add in (False, True):
            parsed = hf.encode(text, add_special_tokens=add)
            assert ours.encode(text, add, parse_special=True) == parsed, text
            plain = hf.encode(text, add_special_tokens=add, split_special_tokens=True)
            assert ours.encode(text, add) == plain, text
        ids = ours.encode(text, parse_special=True)
        assert ours.decode(ids) == hf.decode(ids, clean_up_tokenization_spaces=False)
        shown = hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, True) == shown


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False},
        {"do_lower_case": True, "mask_token": "[MASK]", "tokenizer_class": "BertTokenizer"},
    ],
)
def test_bert_from_vocab_txt(tmp_path, settings):
    folder = wordpiece_folder(tmp_path, **settings)
    ours = Tokenizer.from_pretrained(folder)
    assert_same(ours, transformers.BertTokenizerFast.from_pretrained(folder), roles=("mask", "pad"))
    assert (ours.bos_token_id, ours.eos_token_id) == (3, 4)  # [CLS] and [SEP]


def test_gpt2_from_vocab_json(tmp_path, bpe):
    folder = bpe_folder(tmp_path, bpe, last=["<|endoftext|>"])
    ours = Tokenizer.from_pretrained(folder)
    assert_same(ours, transformers.GPT2TokenizerFast.from_pretrained(folder))
    slow = transformers.GPT2Tokenizer.from_pretrained(folder)
    assert all(ours.encode(text, parse_special=True) == slow.encode(text) for text in TRICKY)
    size = ours.vocab_size
    assert (ours.mask_token_id, ours.pad_token_id) == (None, None)
    assert ours.add_mask_token() == size and ours.mask_token == "<|mask|>"
    assert ours.vocab_size == size + 1
    assert ours.encode("a<|mask|>", parse_special=True)[-1] == size
    ours.save_pretrained(tmp_path / "converted")
    assert Tokenizer.from_pretrained(tmp_path / "converted").mask_token_id == size


@pytest.mark.parametrize("prefix_space", [False, True])
def test_roberta_from_vocab_json(tmp_path, bpe, prefix_space):
    folder = bpe_folder(tmp_path, bpe, ["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"], "roberta",
                        add_prefix_space=prefix_space)
    assert_same(Tokenizer.from_pretrained(folder),
                transformers.RobertaTokenizerFast.from_pretrained(folder))


DREAM = {"tokenizer_class": "DreamTokenizer", "bos_token": "<|beginoftext|>",
         "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>",
         "unk_token": None, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}


def dream_folder(folder, bpe):
    size = len(bpe.backend.get_vocab(with_added_tokens=False))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|beginoftext|>",
              "<|mask|>"]
    added = {str(size + i): {"content": token, "lstrip": False, "rstrip": False,
                             "single_word": False, "normalized": False,
                             "special": token != "<tool_call>"} for i, token in enumerate(tokens)}
    bpe_folder(folder, bpe, model_type="Dream", added_tokens_decoder=added, **DREAM)
    write_json(folder / "config.json", {"model_type": "Dream", "mask_token_id": size + 5,
                                        "eos_token_id": size, "bos_token_id": size})
    return folder


def test_dream_from_vocab_json(tmp_path, bpe):
    """Dream publishes no tokenizer.json: Qwen2's files, with a mask and a beginning of text added
    after."""
    folder = dream_folder(tmp_path, bpe)
    ours = Tokenizer.from_pretrained(folder)
    assert_same(ours, transformers.Qwen2TokenizerFast.from_pretrained(folder))
    assert ours.mask_token == "<|mask|>" and ours.mask_token_id == ours.vocab_size - 1
    # an added token that is not special is text with an id of its own
    assert len(ours.encode("<tool_call>")) == 1


def test_qwen2_with_added_tokens_json(tmp_path, bpe):
    """The older layout: added_tokens.json and special_tokens_map.json."""
    size = len(bpe.backend.get_vocab(with_added_tokens=False))
    folder = bpe_folder(tmp_path, bpe, model_type="qwen2")
    write_json(folder / "added_tokens.json", {"<|im_end|>": size + 2, "<|endoftext|>": size,
                                              "<think>": size + 1})
    roles = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", roles)
    assert_same(Tokenizer.from_pretrained(folder),
                transformers.Qwen2TokenizerFast.from_pretrained(folder))


def llada_folder(folder, bpe):
    """A tokenizer.json with a mask among the added tokens that no tokenizer file names: config.json
    does."""
    copy = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})
    copy.add_special_tokens(["<|startoftext|>", "<|mdm_mask|>"])
    copy.backend.enable_truncation(8)
    copy.backend.enable_padding(length=16)
    copy.backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", {"model_type": "llada",
                                        "mask_token_id": copy.vocab_size - 1})
    return folder


def test_llada_mask_comes_from_config(tmp_path, bpe):
    folder = llada_folder(tmp_path, bpe)
    ours = Tokenizer.from_pretrained(folder)
    assert_same(
        ours, transformers.AutoTokenizer.from_pretrained(folder), roles=("eos", "pad", "bos")
    )  # neither cut nor padded
    assert (ours.mask_token, ours.mask_token_id) == ("<|mdm_mask|>", ours.vocab_size - 1)
    assert ours.add_mask_token() == ours.vocab_size - 1
    ours.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").mask_token == "<|mdm_mask|>"


def test_a_list_of_end_tokens_and_ids_outside_the_vocabulary(tmp_path, bpe):
    folder = bpe_folder(tmp_path, bpe, last=["<|endoftext|>"], model_type="gpt2", eos_token=None)
    write_json(folder / "config.json", {"model_type": "gpt2", "eos_token_id": [7, 8],
                                        "pad_token_id": -1, "mask_token_id": 5000})
    ours = Tokenizer.from_pretrained(folder)
    assert (ours.eos_token_id, ours.pad_token_id) == (7, None)
    assert (ours.mask_token_id, ours.mask_token) == (5000, None)


# --------------------------------------------------------------------------------------------------
# What tokenizer_config.json asks for


def byte_folder(folder, settings, post_processor=None, pre_tokenizer=None, normalizer=None,
                model_type="llama"):
    """A tokenizer.json of bytes with <s> and </s>, and what else a test asks for."""
    tokenizer = Tokenizer.bytes()
    begin, end = tokenizer.add_special_tokens(["<s>", "</s>"])
    if post_processor:
        tokens = [("<s>", begin), ("</s>", end)]
        tokenizer.backend.post_processor = processors.TemplateProcessing(
            single=post_processor, special_tokens=tokens
        )
    tokenizer.backend.pre_tokenizer = pre_tokenizer or tokenizer.backend.pre_tokenizer
    if normalizer:
        tokenizer.backend.normalizer = normalizer
    folder.mkdir(exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", {"model_type": model_type})
    return folder


def same_frames(folder):
    """Whether we and `transformers` give a text the same ids, BOS and EOS included."""
    ours, hf = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    texts = ("the cat", "", " ÀB <s>x")
    return all(
        ours.encode(text, True, parse_special=True) == hf.encode(text, add_special_tokens=True)
        for text in texts
    )


@pytest.mark.parametrize("post_processor", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast",
                                  "Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizer",
                                  "GPTNeoXTokenizerFast", "RobertaTokenizer", "CohereTokenizer",
                                  None])
def test_bos_and_eos_are_those_of_the_class(tmp_path, name, post_processor):
    """Some set them whatever tokenizer.json says (LlamaTokenizerFast), others never do."""
    for begin in (None, True, False):
        for end in (None, True, False):
            settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>",
                        "unk_token": None, "add_bos_token": begin, "add_eos_token": end}
            settings = {key: value for key, value in settings.items()
                        if value is not None or key == "unk_token" and name}
            assert same_frames(byte_folder(tmp_path, settings, post_processor)), settings


def test_deepseeks_distilled_qwen_begins_with_bos(tmp_path):
    settings = {"add_bos_token": True, "add_eos_token": False,
                "bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>",
                "legacy": True, "tokenizer_class": "LlamaTokenizerFast", "unk_token": None}
    ours = Tokenizer.from_pretrained(byte_folder(tmp_path, settings))
    begin, end = ours.backend.token_to_id("<s>"), ours.backend.token_to_id("</s>")
    assert ours.encode("ab", add_special_tokens=True) == [begin, 97, 98]
    assert ours.encode("ab") == [97, 98]
    assert ours.frame() == ([begin], [])
    ours.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.frame() == ([begin], []) and same_frames(tmp_path / "saved")
    both = Tokenizer.from_pretrained(byte_folder(tmp_path, settings | {"add_eos_token": True},
                                                 "<s> $A"))
    assert both.frame() == ([begin], [end])
    # where both are the same token, it stands in front
    one = settings | {"bos_token": "</s>", "eos_token": "</s>"}
    assert Tokenizer.from_pretrained(byte_folder(tmp_path, one)).frame() == ([end], [])
    assert Tokenizer.bytes().frame() == ([], [])
    with pytest.raises(ValueError, match="add_bos_token is true, but bos_token is None"):
        Tokenizer.from_pretrained(byte_folder(tmp_path, settings | {"bos_token": None}))
    with pytest.raises(ValueError, match="add_bos_token should be true or false"):
        Tokenizer.from_pretrained(byte_folder(tmp_path, settings | {"add_bos_token": "false"}))
    with pytest.raises(ValueError, match="'OtherTokenizer' makes of that is not known"):
        other = settings | {"tokenizer_class": "OtherTokenizer"}
        Tokenizer.from_pretrained(byte_folder(tmp_path, other))


def test_gpt2_from_vocab_json_with_bos(tmp_path, bpe):
    """OPT's files: BOS in front, if add_bos_token asks for it; EOS never."""
    folder = bpe_folder(tmp_path, bpe, first=["</s>"], last=["<|endoftext|>"], bos_token="</s>",
                        eos_token="</s>", add_bos_token=True, add_eos_token=True,
                        tokenizer_class="GPT2Tokenizer")
    assert_same(Tokenizer.from_pretrained(folder),
                transformers.GPT2TokenizerFast.from_pretrained(folder))


@pytest.mark.parametrize("name", ["BertTokenizer", "DistilBertTokenizerFast", "MPNetTokenizer",
                                  "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("stored", [dict(lowercase=True), dict(lowercase=False),
                                    dict(lowercase=False, strip_accents=True),
                                    dict(lowercase=True, handle_chinese_chars=False)])
def test_lower_case_and_accents_are_those_of_the_class(tmp_path, name, stored):
    """BertTokenizerFast sets what tokenizer.json says of both, by defaults of its own too."""
    wordpiece_folder(tmp_path)
    backend = Tokenizer.from_pretrained(tmp_path).backend
    (tmp_path / "vocab.txt").unlink()
    texts = ("Naïve CAFÉ Hello", "中文a")
    for settings in (
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False},
    ):
        backend.normalizer = normalizers.BertNormalizer(**stored)
        backend.save(str(tmp_path / "tokenizer.json"))
        tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
                  "pad_token": "[PAD]", "mask_token": "[MASK]"}
        named = {"tokenizer_class": name} if name else {}
        write_json(tmp_path / "tokenizer_config.json", tokens | settings | named)
        ours = Tokenizer.from_pretrained(tmp_path)
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in texts:
            assert ours.encode(text, True) == hf.encode(text), settings


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "RobertaTokenizerFast",
                                  "PreTrainedTokenizerFast", "CodeGenTokenizer", "Qwen2Tokenizer"])
def test_a_space_in_front_is_that_of_the_class(tmp_path, name):
    level = pre_tokenizers.ByteLevel
    split = [pre_tokenizers.Split(" ", "isolated")]
    for stored in (level(add_prefix_space=True), level(add_prefix_space=False),
                   pre_tokenizers.Sequence([*split, level(add_prefix_space=True)]),
                   pre_tokenizers.Sequence([*split, level(add_prefix_space=False)])):
        for settings in ({}, {"add_prefix_space": True}, {"add_prefix_space": False}):
            tokens = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>",
                      "unk_token": None}
            assert same_frames(byte_folder(tmp_path, tokens | settings, "<s> $A", stored)), (
                stored,
                settings,
            )
            Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
            ours = Tokenizer.from_pretrained(tmp_path)
            again = Tokenizer.from_pretrained(tmp_path / "saved")
            assert same_frames(tmp_path / "saved")
            assert again.encode("the cat") == ours.encode("the cat")


def test_a_space_in_front_that_llamas_class_would_take_from_tokenizer_model(tmp_path):
    tokens = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    for stored in (True, False):
        with_space = pre_tokenizers.Metaspace(prepend_scheme="first" if stored else "never")
        Tokenizer.from_pretrained(byte_folder(tmp_path, tokens | {"add_prefix_space": stored},
                                              pre_tokenizer=with_space))
        with pytest.raises(ValueError, match="add_prefix_space is"):
            wrong = tokens | {"add_prefix_space": not stored}
            Tokenizer.from_pretrained(byte_folder(tmp_path, wrong, pre_tokenizer=with_space))


# --------------------------------------------------------------------------------------------------
# Chat

TEMPLATES = {
    "qwen": "{%- if tools %}\n    {{- tools | tojson }}\n{%- else %}\n"
            "    {%- if messages[0]['role'] == 'system' %}\n"
            "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
            "    {%- else %}\n"
            "        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n"
            "    {%- endif %}\n{%- endif %}\n{%- for message in messages %}\n"
            "    {%- if (message.role == 'user')"
            " or (message.role == 'assistant' and not loop.first) %}\n"
            "        {{- '<|im_start|>' + message.role + '\\n' + message.content"
            " + '<|im_end|>' + '\\n' }}\n"
            "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
            "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "llada": "{% set loop_messages = messages %}{% for message in loop_messages %}"
             "{% set content = '<|start_header_id|>' + message['role'] "
             "+ '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
             "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
             "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
              "{% else %}{% set loop_messages = messages %}{% endif %}"
              "{% for message in loop_messages %}{% if message['role'] == 'user' %}"
              "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
              "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
    "helpers": "{% for m in messages %}  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
               "  {% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}\n{% endfor %}"
               "{{ strftime_now('%Y') }}{{ mask_token is defined }}{{ documents is none }}",
    "default": CHAT_TEMPLATE,
}
CHATS = [
    [{"role": "user", "content": "Hi <there> & 'you'!\n "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 1+1? "},
        {"role": "assistant", "content": "2 é 中"},
        {"role": "user", "content": "<|im_end|>sure?"},
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja",
                                   "chat_template.json"])
def test_chat_templates_render_as_transformers_does(tmp_path, bpe, name, where):
    folder = dream_folder(tmp_path, bpe)
    if where == "chat_template.jinja":
        (folder / where).write_text(TEMPLATES[name], encoding="utf-8")
    else:
        old = json.loads((folder / where).read_text()) if (folder / where).exists() else {}
        write_json(folder / where, old | {"chat_template": TEMPLATES[name]})
    ours = Tokenizer.from_pretrained(folder)
    hf = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    for chat in CHATS:
        for prompt in (False, True):
            options = {"add_generation_prompt": prompt, "chat_template": TEMPLATES[name]}
            text = hf.apply_chat_template(chat, tokenize=False, **options)
            assert ours.render_chat(chat, prompt) == text
            assert ours.apply_chat_template(chat, prompt) == hf.apply_chat_template(chat, **options)
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = hf.apply_chat_template(CHATS[0], tools=tools, tokenize=False, add_generation_prompt=True,
                                  chat_template=TEMPLATES[name])
    assert ours.render_chat(CHATS[0], tools=tools) == text


def test_named_templates(tmp_path, bpe):
    folder = dream_folder(tmp_path, bpe)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"},
             {"name": "tool_use", "template": "tools {{ tools|length }}"}]
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": named})
    ours = Tokenizer.from_pretrained(folder)
    assert ours.render_chat(CHATS[0]) == "plain"
    assert ours.render_chat(CHATS[0], template="tool_use", tools=[1, 2]) == "tools 2"
    ours.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").chat_templates == ours.chat_templates
    with pytest.raises(ValueError, match="default, tool_use"):
        ours.render_chat(CHATS[0], template="rag")


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for m in messages %}", "end of template"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 9 ** 9 ** 9 }}", "not allowed"),
        ("{{ 'x' * 10000 * 10000 * 10000 }}", "not allowed"),
        ("{{ 'x' * 10000000000 }}", "not allowed"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "longer than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include '/etc/passwd' %}", "loader"),
    ],
)
def test_templates_that_fail(template, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        render_template(template, {"messages": CHATS[0]}, seconds=0.3)
    assert str(caught.value).startswith("the chat template failed: ")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Damaged folders


GPT2 = '{"model_type": "gpt2"}'


@pytest.mark.parametrize("files, error, words", [
    ({}, FileNotFoundError, "looked for tokenizer.json, vocab.txt"),
    ({"vocab.json": "{}"}, FileNotFoundError, "merges.txt"),
    ({"tokenizer.model": "x"}, ValueError, "sentencepiece"),
    ({"tokenizer.json": "{"}, ValueError, "tokenizer.json"),
    ({"tokenizer.json": "[]"}, ValueError, "tokenizer.json"),
    ({"vocab.txt": "a\nb\n"}, ValueError, "vocab.txt"),
    ({"vocab.txt": ""}, ValueError, "vocab.txt"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, ValueError, "gpt2, roberta, qwen2"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n", "config.json": GPT2}, ValueError,
     "merges.txt"),
    ({"vocab.json": '{"a": "x"}', "merges.txt": "", "config.json": GPT2}, ValueError, "vocab.json"),
    ({"vocab.json": "[1]", "merges.txt": "", "config.json": GPT2}, ValueError, "vocab.json"),
    ({"tokenizer_config.json": '{"a": 1'}, ValueError, "tokenizer_config.json"),
    ({"config.json": "[" * 100_000}, ValueError, "config.json"),
    ({"special_tokens_map.json": '{"mask_token": 7}'}, ValueError, "special_tokens_map.json"),
])
def test_damaged_folders(tmp_path, files, error, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=words) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


NINE = {"9": {"content": "<|mask|>", "special": True}}


@pytest.mark.parametrize("name, change, words", [
    ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
    ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "chat_template"),
    ("tokenizer_config.json", {"eos_token": ["x"]}, "tokenizer_config.json"),
    ("tokenizer_config.json", {"added_tokens_decoder": NINE}, "token 9"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"nine": {"content": "x"}}},
     "tokenizer_config.json"),
    ("tokenizer_config.json", {"added_tokens_decoder": 3}, "tokenizer_config.json"),
    ("tokenizer_config.json", {"additional_special_tokens": 3}, "additional_special_tokens"),
    ("config.json", {"mask_token_id": "many"}, "mask_token_id"),
    ("config.json", {"mask_token_id": -5}, "mask_token_id"),
])
def test_contradicting_settings(tmp_path, bpe, name, change, words):
    bpe.save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("{}")     # no longer as we left it
    old = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    write_json(tmp_path / name, old | change)
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_pretrained(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


def test_fuzzed_files(tmp_path, bpe):
    """Whatever a file holds, from_pretrained works or says ValueError."""
    bpe_folder(tmp_path, bpe, last=["<|endoftext|>"])
    Tokenizer.train(CORPUS, vocab_size=270).save_pretrained(tmp_path)
    rng = random.Random(0)
    failed = 0
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                 "config.json"):
        original = (tmp_path / name).read_bytes()
        hidden = tmp_path / "tokenizer.json"
        if name in ("vocab.json", "merges.txt"):
            hidden.rename(tmp_path / "hidden")
        for _ in range(100):
            damaged = bytearray(original)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(damaged) + 1)
                damaged[at : at + rng.randrange(3)] = rng.choice(
                    [b"", b"\xff", b"null", b"0", b"-1", b"[]", b'"', b"}", b"99999999999", b" "]
                )
            (tmp_path / name).write_bytes(damaged)
            try:
                Tokenizer.from_pretrained(tmp_path).encode("the quick", True, True)
            except (ValueError, FileNotFoundError):
                failed += 1
        (tmp_path / name).write_bytes(original)
        if (tmp_path / "hidden").exists():
            (tmp_path / "hidden").rename(hidden)
    assert failed > 100


# --------------------------------------------------------------------------------------------------
# Nobody's words are a mask


def with_mask(kind, folder):
    """(a tokenizer, a text that spells its mask) of each kind in which a mask can get into text."""
    tokenizer = Tokenizer.bytes()
    if kind == "ours":
        return tokenizer, "a<|mask|>b"
    if kind == "config":                                    # LLaDA's: only config.json names it
        return Tokenizer.from_pretrained(llada_folder(folder, tokenizer)), "a <|mdm_mask|> b"
    if kind == "bert":
        return Tokenizer.from_pretrained(wordpiece_folder(folder)), "the [MASK] mask"
    if kind == "bert, normalized":                          # found in the lower-cased text, too
        wordpiece_folder(folder)
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").replace("[MASK]", "[mask]")
        (folder / "vocab.txt").write_text(lines, encoding="utf-8")
        mask = {"content": "[mask]", "normalized": True, "special": False}
        settings = {"mask_token": "[mask]", "added_tokens_decoder": {"5": mask}}
        write_json(folder / "tokenizer_config.json", settings)
        return Tokenizer.from_pretrained(folder), "the [MASK] mask"
    if kind == "roberta":
        tokens = ["<s>", "<pad>", "</s>", "<unk>"]
        bpe_folder(folder, tokenizer, tokens, ["<mask>"], "roberta")
        return Tokenizer.from_pretrained(folder), "a <mask> b"
    if kind == "not special":
        tokenizer = Tokenizer.train(["a b " * 50], 270)     # bytes alone need no library
        tokenizer.backend.add_tokens([AddedToken("<|m|>", special=False, normalized=False)])
        return Tokenizer(tokenizer.backend, {"mask_token": "<|m|>"}), "a<|m|>b"
    if kind == "words":                                     # in the vocabulary itself
        backend = Backend(models.WordLevel({"a": 0, "[MASK]": 1, "?": 2, "b": 3}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return Tokenizer(backend, {"mask_token": "[MASK]"}), "a [MASK] b"
    if kind == "whole words":                               # BPE that takes words it knows whole
        vocab = {**tokenizer.backend.get_vocab(with_added_tokens=False), "<m": 256, "<m>": 257}
        merges = [("<", "m"), ("<m", ">")]
        backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return Tokenizer(backend, {"mask_token": "<m>"}), "a <m> b"
    pieces = [("?", 0.0), *((c, -5.0) for c in "ab<m>"), ("<m>", -1.0)]
    return Tokenizer(Backend(models.Unigram(pieces, unk_id=0)), {"mask_token": "<m>"}), "a<m>b"


@pytest.mark.parametrize("kind", ["ours", "config", "bert", "bert, normalized", "roberta",
                                  "not special", "words", "whole words", "unigram"])
def test_no_text_spells_the_mask(tmp_path, kind):
    """Its spelling is what it would be if there were no such token; all else is as before."""
    tokenizer, text = with_mask(kind, tmp_path)
    mask = tokenizer.mask_token_id
    assert mask in tokenizer.encode(text, parse_special=True)           # as `transformers`
    for options in ({}, {"parse_special": True, "parse_mask": False}):
        spelled, other = tokenizer.encode_batch([text, "a b"], **options)
        assert mask not in spelled and len(spelled) >= 3
        assert spelled[0] == tokenizer.encode(text, parse_special=True)[0]
        assert other == tokenizer.encode("a b", parse_special=True)
        if kind in ("ours", "config", "roberta", "not special"):
            assert tokenizer.decode(spelled) == text
    control = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()
               if token.content != tokenizer.mask_token]
    for token in control:
        ids = tokenizer.encode(token + text, parse_special=True, parse_mask=False)
        assert ids[0] == tokenizer.backend.token_to_id(token) and mask not in ids
    for text in TEXTS * (kind in ("ours", "config", "roberta", "bert")):
        ids = tokenizer.encode(text, parse_special=True)
        assert mask in ids or ids == tokenizer.encode(text, parse_special=True, parse_mask=False)


def test_a_mask_that_is_added_later_is_text_as_well(bpe):
    tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})
    ids = tokenizer.encode("<|mask|>", parse_special=True, parse_mask=False)
    assert tokenizer.mask_token_id not in ids
    new, = tokenizer.add_special_tokens(["<|eot|>"])        # after a text that spelled a mask
    ids = tokenizer.encode("<|mask|><|eot|>", parse_special=True, parse_mask=False)
    assert ids[-1] == new and tokenizer.decode(ids[:-1]) == "<|mask|>" and len(ids) == 9


def test_a_mask_with_a_second_part_stays_readable():
    """A model that masks with its unknown token: what the vocabulary lacks is still that."""
    backend = Backend(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend, {"mask_token": "?", "unk_token": "?"})
    assert tokenizer.encode("a b") == [0, 1]


def test_a_user_who_spells_the_mask_in_a_chat():
    tokenizer = Tokenizer.bytes()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is <|mask|>?"}])
    assert tokenizer.mask_token_id not in ids
    assert tokenizer.decode(ids).startswith("<|im_start|>user\nWhat is <|mask|>?<|im_end|>")
    assert ids[0] == 258 and ids.count(259) == 1            # the template's tokens are tokens


# --------------------------------------------------------------------------------------------------
# No chat template


def test_chatml_in_place_of_a_template_is_said_once(tmp_path, bpe, capsys):
    bpe_folder(tmp_path, bpe, last=["<|endoftext|>"])
    chat = [{"role": "user", "content": "hi"}]
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    tokenizer.encode("no chat")
    assert capsys.readouterr().err == ""
    for _ in range(3):
        tokenizer.apply_chat_template(chat)
        Tokenizer.from_pretrained(tmp_path).render_chat(chat)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "no chat template" in said.err and "ChatML" in said.err
    assert str(tmp_path) in said.err


def test_a_copy_of_a_checkpoint_without_a_template_has_none(tmp_path, bpe, capsys):
    """Until it is prepared to be trained in ChatML."""
    bpe_folder(tmp_path, bpe, last=["<|endoftext|>"])
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    tokenizer.add_mask_token()
    tokenizer.save_pretrained(tmp_path / "converted")
    chat = [{"role": "user", "content": "hi"}]
    Tokenizer.from_pretrained(tmp_path / "converted").render_chat(chat)
    assert "no chat template" in capsys.readouterr().err
    tokenizer.add_chat_tokens()
    tokenizer.save_pretrained(tmp_path / "trained")
    again = Tokenizer.from_pretrained(tmp_path / "trained")
    assert again.render_chat(chat) == tokenizer.render_chat(chat)
    assert "trained" not in capsys.readouterr().err


def test_who_brings_a_template_hears_nothing(tmp_path, bpe, capsys):
    folder = dream_folder(tmp_path, bpe)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for tokenizer in (Tokenizer.from_pretrained(folder), Tokenizer.bytes(), bpe):
        tokenizer.render_chat(CHATS[0])
    tokenizer = Tokenizer.from_pretrained(bpe_folder(tmp_path, bpe))
    tokenizer.chat_templates = {"default": "{{ messages[0].content }}"}      # given by hand
    tokenizer.render_chat(CHATS[0])
    assert capsys.readouterr().err == ""
