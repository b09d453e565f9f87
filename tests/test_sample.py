"""sample.py and sampling/sampler.py: what a user types and sees, in pipes and terminals; the
recorded run; mistakes."""

import functools
import json
import os
import pty
import re
import signal
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
from scripts import ROOT, Script, run, run_here
from tiny import tiny_checkpoint, tiny_model, tiny_sampler
from tokenizers import Tokenizer as Backend
from tokenizers import processors

import kernels
from data.tokenizer import Tokenizer
from sampling.chat import converse
from sampling.sampler import Sampler
from sampling.trace import Trace

REPORT = re.compile(
    r"(\d+) tokens in (\d+) forward passes \((\d+\.\d\d) tokens a pass\), "
    r"\d+\.\d\d s, \d+\.\d tokens/s"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def sample(checkpoint, *arguments, **options):
    """What a run that succeeded printed. It is one of this process, unless there are options for
    one of its own."""
    start = run if options else run_here
    result = start("sample.py", f"--checkpoint={checkpoint}", "--device=cpu", *arguments, **options)
    assert (result.status, result.err) == (0, ""), result
    return result.out


# ---- runs ----------------------------------------------------------------------------------------
def test_a_prompt_is_continued_and_the_seed_decides(checkpoint):
    arguments = ("--prompt=Once upon", "--max_new_tokens=12", "--steps=6")
    first, second, other = (sample(checkpoint, *arguments, f"--seed={seed}") for seed in (1, 1, 2))
    texts = [out.rpartition("\n\n")[0] for out in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]
    assert first.startswith("Once upon")
    assert REPORT.search(first).groups() == ("12", "6", "2.00")


def test_several_samples_out_of_nothing(checkpoint):
    out = sample(checkpoint, "--num_samples=2", "--max_new_tokens=10")
    assert re.match(r"--- 1 of 2\n.*--- 2 of 2\n.*20 tokens in 10 forward passes", out, re.DOTALL)
    # The default fits into the context, after the end of text at which a text begins.
    assert "127 tokens" in sample(checkpoint, "--steps=2")


def test_gaps_are_filled_and_the_rest_is_kept(checkpoint):
    out = sample(checkpoint, "--infill=A [MASK] and [MASK:3] B, ünïcode", "--temperature=0")
    assert re.match(r"A .+ and .+ B, ünïcode\n\n4 tokens in 4", out, re.DOTALL)


def test_a_prompt_from_a_file(checkpoint, tmp_path):
    # Begun with a byte order mark, as some editors do.
    (tmp_path / "prompt.txt").write_text("\ufeffFrom a file,\ntwo lines", encoding="utf-8")
    assert sample(
        checkpoint, f"--prompt=FILE:{tmp_path}/prompt.txt", "--max_new_tokens=4"
    ).startswith("From a file,\ntwo lines")


@pytest.mark.parametrize(
    "options",
    [
        "--temperature=1 --remasking=entropy",
        "--remasking=margin --temperature=0.5 --block_length=4",
        "--remasking=ancestral --steps=30",
        "--threshold=0.9 --cache=prefix --block_length=4",
        "--factor=1 --cache=dual --block_length=4",
        "--cfg_scale=1.5 --cache=none",
        "--schedule=timesteps --dtype=bfloat16",
        "--top_p=0.5 --top_k=9 --alg_temp=0.2",
        "--entropy_bound=2 --remasking=entropy",
        "--remask=0.3 --remask_schedule=rescale --steps=20",
        "--suppress=eos,65,<|mask|> --defer=eot",
    ],
)
def test_every_option_of_the_sampler(checkpoint, options):
    out = sample(checkpoint, "--prompt=ab", "--max_new_tokens=8", *options.split())
    assert out.startswith("ab") and REPORT.search(out)


def test_remasking_is_seen_and_a_suppressed_letter_is_not(checkpoint):
    out = sample(
        checkpoint,
        "--prompt=ab",
        "--max_new_tokens=16",
        "--steps=40",
        "--remask=0.5",
        "--remask_schedule=rescale",
        "--show",
    )
    masks = [line.count("░") for line in out.split("\n") if line.startswith("step")]
    assert sorted(masks, reverse=True) != masks and masks[-1] == 0, "a token was masked again"
    suppressed = ",".join(str(ord(letter)) for letter in "eaoiunt")
    assert not set("eaoiunt") & set(
        sample(checkpoint, "--max_new_tokens=60", f"--suppress={suppressed}", "--seed=2").partition(
            "\n\n"
        )[0]
    )


def test_autoregressive_and_block_diffusion_models(tmp_path):
    tiny_checkpoint(tmp_path / "ar", causal=True, shift=True, bos_token_id=256)
    tiny_checkpoint(tmp_path / "block", block_length=4)
    for name in ("ar", "block"):
        assert sample(tmp_path / name, "--prompt=ab", "--max_new_tokens=8").startswith("ab")
        assert REPORT.search(sample(tmp_path / name, "--max_new_tokens=8", "--show"))
    assert (
        "autoregressive" in run("sample.py", f"--checkpoint={tmp_path}/ar", "--infill=a[MASK]").err
    )


def test_a_setting_without_effect_is_named(tmp_path):
    """block_length and steps of a model that has its own way, max_new_tokens where gaps say it."""
    asked = dict(block_length=8, steps=3, max_new_tokens=5, infill="")
    reader = tiny_sampler(causal=True, shift=True, bos_token_id=256)
    assert reader.without_effect(asked) == [
        "block_length 8 is not used: tiny writes one token after another",
        "steps 3 is not used: tiny writes one token after another",
    ]
    assert tiny_sampler(block_length=4).without_effect(asked) == [
        "block_length 8 is not used: tiny writes in blocks of 4 tokens"
    ]
    assert tiny_sampler(block_length=8).without_effect(asked) == []
    by_rule = asked | dict(block_length=0, max_new_tokens=0, threshold=0.9)
    assert tiny_sampler().without_effect(by_rule) == [
        "steps 3 is not used: threshold decides how many tokens a step keeps"
    ]
    assert tiny_sampler(threshold=0.9).without_effect(by_rule) == []  # LLaDA2's adds to the steps
    [line] = tiny_sampler().without_effect(asked | dict(infill="a[MASK]"))
    assert line.startswith("max_new_tokens 5 is not used: a text with gaps")
    tiny_checkpoint(tmp_path, block_length=4)
    result = run("sample.py", f"--checkpoint={tmp_path}", "--max_new_tokens=8", "--block_length=8")
    assert result.status == 0 and result.err.startswith("note: block_length 8 is not used")


# ---- watching ------------------------------------------------------------------------------------
def test_show_prints_a_line_a_step_where_there_is_no_terminal(checkpoint):
    out = sample(checkpoint, "--prompt=a\nb", "--max_new_tokens=6", "--show")
    steps = [line for line in out.split("\n") if line.startswith("step")]
    assert [line.count("░") for line in steps] == [5, 4, 3, 2, 1, 0]
    assert all("a⏎b" in line for line in steps) and "\033" not in out


def open_terminal(path):
    """In the script's process: the pseudoterminal becomes its standard streams and controls it."""
    os.setsid()
    terminal = os.open(path, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(terminal, stream)
    sys.stdin, sys.stdout, sys.stderr = (
        open(0, closefd=False),
        open(1, "w", buffering=1, closefd=False),
        open(2, "w", buffering=1, closefd=False),
    )


class Typist:
    """A script in a terminal: `type` keys, `read` the screen."""

    def __init__(self, *arguments):
        self.keys, end = pty.openpty()
        self.script = Script(*arguments, before=functools.partial(open_terminal, os.ttyname(end)))
        self.end, self.screen = end, ""

    def type(self, text):
        os.write(self.keys, text.encode())

    def read_until(self, words, seconds=30):
        os.set_blocking(self.keys, False)
        stop, start = time.monotonic() + seconds, len(self.screen)
        while words not in self.screen[start:]:
            assert time.monotonic() < stop, self.screen
            try:
                self.screen += os.read(self.keys, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        return self.screen[start:]

    def wait(self):
        result = self.script.wait(30)
        os.close(self.end)
        os.close(self.keys)
        return result.status


def test_show_redraws_in_a_terminal(checkpoint):
    typist = Typist(
        "sample.py",
        f"--checkpoint={checkpoint}",
        "--prompt=ab",
        "--max_new_tokens=6",
        "--show",
        "--remasking=low_confidence",
        "--pause=0.001",
    )
    screen = typist.read_until("tokens/s")
    assert typist.wait() == 0
    assert screen.count("\033[J") == 6, "each step takes back the last"
    assert screen.count("░") == 5 + 4 + 3 + 2 + 1 and "\033[38;5;" in screen and "\033[2m" in screen


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.script, self.inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.script += data * self.inside


def test_the_trace_is_one_page_that_replays_the_run(checkpoint, tmp_path):
    prompt = "</script><img src=x onerror=alert(1)> & <!-- é\n"
    out = sample(
        checkpoint,
        f"--prompt={prompt}",
        "--max_new_tokens=12",
        "--steps=6",
        "--remasking=low_confidence",
        f"--html={tmp_path}/trace.html",
    )
    text = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert "trace.html" in out and out.startswith(prompt)
    assert not re.search(r"(?i)https?:|//\w+\.|@import|url\(", text), (
        "nothing is fetched from elsewhere"
    )
    page = Page(text)
    assert [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "action")
    ] == ["data:,"]
    assert (
        "img" not in [tag for tag, _ in page.tags]
        and [tag for tag, _ in page.tags].count("script") == 1
    )
    trace = json.loads(re.search(r"const TRACE = (.*);\n", page.script)[1])
    first, *steps, last = trace["messages"]
    [row] = first["rows"]
    assert (
        "".join(row[: len(prompt.encode())]) == prompt
        and row[len(prompt.encode()) :] == [None] * 12
    )
    assert [len(step["changes"]) for step in steps] == [2] * 6 and [
        step["step"] for step in steps
    ] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        for b, i, piece, confidence in step["changes"]:
            assert b == 0 and row[i] is None and 0 < confidence <= 1
            row[i] = piece
    assert None not in row and len(last["pieces"][0]) == len(row)


def test_the_trace_of_a_block_model_ends_where_its_text_ends():
    sampler = tiny_sampler(block_length=4)
    with torch.no_grad():
        sampler.model.head.weight.zero_()
        sampler.model.head.weight[256] = 1  # end of text or not, as the sign of a sum decides
        sampler.model.head.weight[65] = -1
    trace = Trace(sampler)
    answers = sampler.run(
        [[65, 65], [66] * 5],
        sampler.arguments(40, {**sample_settings(), "temperature": "1"}),
        on_step=trace,
    )
    assert (
        [len(row) for row in trace.rows]
        == [len(answer) for answer in answers]
        == trace.messages[-1]["lengths"]
    )
    assert min(map(len, answers)) < 42
    assert trace.canvas == answers and trace.finish().messages[-1]["pieces"] == [
        sampler.pieces(answer) for answer in answers
    ]


# ---- chat ----------------------------------------------------------------------------------------
def read_from(path):
    """In the script's process: the file is its standard input."""
    os.dup2(os.open(path, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)


def talk(checkpoint, text, tmp_path, *arguments):
    (tmp_path / "said").write_bytes(text)
    return sample(
        checkpoint,
        "--chat",
        *arguments,
        before=functools.partial(read_from, str(tmp_path / "said")),
    )


def test_a_chat_in_a_pipe(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "chat", max_len=400)
    out = talk(
        checkpoint,
        b"one\n\n/reset\ntwo\nthree\n" + b"long " * 100 + b"\nnot \xff UTF-8\n/exit\nnever read\n",
        tmp_path,
        "--max_new_tokens=20",
    )
    assert len(REPORT.findall(out)) == 4 and "(forgotten)" in out
    assert "error: " in out and "context of 400" in out, (
        "too long a question is refused, and the chat goes on"
    )
    assert "forgotten)" in out and out.count("error: ") == 1


def test_a_chat_packs_its_matrices_once(monkeypatch):
    """Not for each answer, and it leaves the model as it was."""
    sampler, lines, packed = tiny_sampler(max_len=400), ["one", "two", "three"], []
    monkeypatch.setattr("builtins.input", lambda _: lines.pop(0) if lines else "/exit")
    plain = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda *a: packed.append(plain(*a)) or packed[-1])
    settings = {**sample_settings(), "max_new_tokens": 4, "show": False, "pause": 0.0}
    converse(sampler, settings)
    assert not lines and [len(changed) > 0 for changed in packed] == [True, False, False, False]
    assert all("forward" not in vars(module) for module in sampler.model.modules())


def test_a_chat_about_the_mask(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "chat", max_len=400)
    out = talk(checkpoint, b"What is <|mask|>?\nAnd [MASK]?", tmp_path, "--max_new_tokens=4")
    assert len(REPORT.findall(out)) == 2 and "error" not in out


def test_a_chat_in_chatml_for_want_of_a_template_says_so(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "chat", max_len=400)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "said").write_bytes(b"one\ntwo")
    result = run(
        "sample.py",
        f"--checkpoint={checkpoint}",
        "--device=cpu",
        "--chat",
        "--max_new_tokens=4",
        before=functools.partial(read_from, str(tmp_path / "said")),
    )
    assert result.status == 0 and re.fullmatch(r"note: [^\n]*template[^\n]*\n", result.err), result
    assert sample(checkpoint, "--prompt=a", "--max_new_tokens=2"), "and nothing where nobody chats"


def test_a_chat_forgets_its_oldest_turns(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "chat", max_len=100)
    out = talk(checkpoint, b"one\ntwo\nthree\nfour", tmp_path, "--max_new_tokens=20")
    assert (
        len(REPORT.findall(out)) == 4
        and "the oldest 2 messages no longer fit" in out
        and "error" not in out
    )


def test_ctrl_c_stops_an_answer_and_not_the_chat(tmp_path):
    typist = Typist(
        "sample.py",
        f"--checkpoint={tiny_checkpoint(tmp_path / 'chat', max_len=400)}",
        "--chat",
        "--max_new_tokens=200",
        "--pause=0.05",
    )
    typist.read_until("> ")
    typist.type("hello\n")
    typist.read_until("step 3")
    typist.script.signal(signal.SIGINT)
    assert "stopped" in typist.read_until("\n> ")
    typist.script.signal(signal.SIGINT)
    typist.read_until("/exit or Ctrl-D leaves")
    typist.type("/exit\n")
    assert typist.wait() == 0


# ---- mistakes ------------------------------------------------------------------------------------
def test_mistakes_about_files(checkpoint, tmp_path):
    result = run("sample.py", "--checkpoint=checkpoints/mdml", environment={"HF_HUB_OFFLINE": "1"})
    assert (
        result.status == 2
        and "did you mean checkpoints/mdlm?" in result.err
        and "Traceback" not in result.err
    )
    (checkpoint / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    result = run("sample.py", f"--checkpoint={checkpoint}")
    (tmp_path / "tokenizer.json").rename(checkpoint / "tokenizer.json")
    assert result.status == 2 and "no tokenizer" in result.err


# ---- sampling/sampler.py -------------------------------------------------------------------------
def test_pieces_stand_where_their_tokens_do():
    sampler = tiny_sampler()
    tokens = list("aé€😀".encode())
    assert sampler.pieces(tokens) == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert sampler.pieces([97, 257, 98]) == ["a", None, "b"]
    assert sampler.pieces([0xC3, 257, 98])[1:] == [None, "b"], "half a character beside a mask"
    broken = [0xFF] * 9 + [97]
    assert len(sampler.pieces(broken)) == 10 and sampler.pieces(broken)[-1].endswith("a")


def make_wordpiece(folder):
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "play", "##ing", ".", ","]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return Tokenizer.from_pretrained(folder)


def test_a_wordpiece_model_finds_its_mask_and_its_frame(tmp_path):
    sampler = Sampler(
        tiny_model(vocab_size=11, mask_token_id=None, eos_token_id=None),
        make_wordpiece(tmp_path / "bert"),
    )
    assert sampler.mask_id == sampler.config.mask_token_id == 4
    assert sampler.encode_prompt("the cat") == [2, 5, 6]
    assert sampler.encode_gaps("the [MASK] [MASK:2].") == [2, 5, 4, 4, 4, 9, 3]
    assert sampler.pieces([5, 6, 7, 8, 9]) == ["the", " cat", " play", "ing", "."]
    assert sampler.pieces([5, 4, 8])[:2] == ["the", None]


@pytest.mark.parametrize("text", ["a [MASK] b", "[mask]", "[MASK][MASK]"])
def test_the_masks_spelling_in_a_prompt_is_text(tmp_path, text):
    """Only a gap with a number, which is no model's spelling, is a mistake; --infill reads both."""
    model = tiny_model(vocab_size=11, mask_token_id=None, eos_token_id=None)
    words = Sampler(model, make_wordpiece(tmp_path / "bert"))
    for sampler in (words, tiny_sampler()):
        assert sampler.mask_id not in sampler.encode_prompt(text)
        assert sampler.mask_id not in sampler.encode_chat([{"role": "user", "content": text}])
        with pytest.raises(ValueError, match="character 2: use infill"):
            sampler.encode_prompt("a [MASK:1]")
    assert tiny_sampler().encode_prompt("<|mask|>[MASK]") == list(b"<|mask|>[MASK]")


def test_the_masks_spelling_is_text_around_gaps_too():
    assert tiny_sampler().encode_gaps("<|mask|>[MASK]<|mask|>") == [*b"<|mask|>", 257, *b"<|mask|>"]


def test_a_gap_takes_the_space_before_it_where_words_carry_theirs():
    bpe = Sampler(
        tiny_model(vocab_size=400, mask_token_id=398, eos_token_id=399),
        Tokenizer.train(["the cat and the dog and the cow " * 50], 300),
    )
    assert bpe.encode_gaps("the [MASK] and")[-3:] == [
        *bpe.tokenizer.encode("the")[-1:],
        398,
        *bpe.tokenizer.encode(" and"),
    ]
    assert tiny_sampler().encode_gaps("a [MASK] b") == [97, 32, 257, 32, 98], "a byte is a byte"


def test_tokens_by_name():
    sampler = tiny_sampler()
    assert (
        sampler.named_tokens("defer", "eos, 65,eot,<|mask|>") == (65, 256, 257, 259)
        and sampler.named_tokens("defer", "") == ()
    )
    assert (
        sampler.arguments(4, {**sample_settings(), "defer": "eos"})["remasking"] == "low_confidence"
    ), "auto is a rule that asks"
    remasked = sampler.arguments(20, {**sample_settings(), "remask": 0.1})
    assert (remasked["remasking"], remasked["block_length"]) == ("ancestral", 20)
    plain = sampler.arguments(20, sample_settings())
    assert (plain["remasking"], plain["block_length"], plain["steps"]) == ("entropy", 8, 24)
    fast = sampler.arguments(20, {**sample_settings(), "steps": 4})
    assert (fast["remasking"], fast["block_length"]) == ("random", 20)


def sample_settings():
    return {
        "steps": 0,
        "block_length": 0,
        "temperature": "auto",
        "remasking": "auto",
        "cache": "auto",
        "cfg_scale": 0.0,
        "schedule": "",
        "seed": 0,
    }


def test_an_answer_ends_where_the_template_says():
    sampler = tiny_sampler()
    assert sampler.end_of_turn == {259}  # <|im_end|>
    assert sampler.decode([65, 66, 259, 67], chat=True) == ("AB", 2, True)
    assert sampler.decode([65, 66, 259, 67])[0] == "ABC"
    assert sampler.decode([65, 256, 67]) == ("A", 1, True)
    assert sampler.decode([65, 66]) == ("AB", 2, False)
    assert sampler.split([65, 256, 66, 256]) == ["A", "B", ""]
    odd = Tokenizer(
        Backend.from_str(sampler.tokenizer.backend.to_str()),
        chat_templates={"default": "{{ messages[-1].content }}."},
    )
    assert Sampler(tiny_model(), odd).end_of_turn == set()


def test_no_mask_token_anywhere():
    tokenizer = Tokenizer.bytes()
    tokenizer.mask_token_id = None
    with pytest.raises(ValueError, match="mask token"):
        Sampler(tiny_model(mask_token_id=None), tokenizer)


def test_the_page_has_its_placeholder():
    assert (ROOT / "sampling" / "page.html").read_text(encoding="utf-8").count(
        "/*TRACE*/ null"
    ) == 1


# ---- ends of text, BOS, stops --------------------------------------------------------------------
def test_a_completion_is_cut_at_any_end_of_text():
    sampler = tiny_sampler(eos_token_id=250, eos_token_ids=[250, 251])
    assert sampler.ends == {250, 251, 256}  # 256 is the tokenizer's own
    for end in (250, 251, 256):
        assert sampler.decode([97, 98, end, 99]) == ("ab", 2, True)
    assert sampler.split([97, 251, 98, 250, 99]) == ["a", "b", "c"]
    assert sampler.named_tokens("suppress", "eos") == (250, 251, 256)


def test_what_stands_around_a_text_is_read_off_a_text():
    """BOS that is EOS as well stands in front; that of a chat template is not doubled."""
    tokenizer = Tokenizer.bytes()
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    sampler = Sampler(tiny_model(), tokenizer)
    assert (sampler.head, sampler.tail) == ([256], [])
    assert sampler.encode_prompt("ab") == [256, 97, 98]
    assert sampler.encode_gaps("a[MASK]") == [256, 97, 257]
    tokenizer.chat_templates = {"default": "{{ bos_token }}{{ messages[0].content }}"}
    assert sampler.encode_chat([{"role": "user", "content": "a"}]) == [256, 97]


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("4<|im_end|>the end", ["<|im_end|>"], "4"),
        ("4<|im_end|>\n5", ["<|im_end|>\n"], "4"),
        ("4<|im_end|>5", ["<|im_end|>\n"], None),
        ("4!<|im_end|>5", ["!<|im_end|>"], "4"),
        ("a<|im_start|>b<|im_end|>c", ["x", "<|im_end|>"], "ab"),
        ("é中<|im_start|><|im_end|>c", ["<|im_start|><|im_end|>"], "é中"),
        ("a<|im_end|>b<|im_start|>", ["<|im_start|>", "<|im_end|>"], "a"),
        ("<|im_end|>", ["<|im_end|>"], ""),
        ("a<|im_start|>b", ["<|im_end|>"], None),
        ("a<|im_end|>b", ["im", "|", "<|im"], None),
        ("a<|im_end|>b", [], None),
        ("a!<|endoftext|>", ["!<|endoftext|>"], "a"),
    ],
)
def test_stops_that_spell_special_tokens(text, stops, expected):
    sampler = tiny_sampler()
    tokens = sampler.tokenizer.encode(text, parse_special=True)
    plain = sampler.tokenizer.decode(tokens, skip_special_tokens=True)
    assert sampler.cut_at_special(tokens, plain, stops) == (
        (plain, False) if expected is None else (expected, True)
    )


def test_stops_that_spell_special_tokens_between_words(tmp_path):
    """WordPiece puts spaces between tokens."""
    sampler = Sampler(
        tiny_model(vocab_size=11, mask_token_id=None, eos_token_id=None),
        make_wordpiece(tmp_path / "bert"),
    )
    tokens = sampler.tokenizer.encode("the cat[SEP]the[MASK]cat", parse_special=True)
    text = sampler.tokenizer.decode(tokens, skip_special_tokens=True)
    assert sampler.cut_at_special(tokens, text, ["[MASK]"]) == ("the cat the", True)
    assert sampler.cut_at_special(tokens, text, ["[SEP]"]) == ("the cat", True)
