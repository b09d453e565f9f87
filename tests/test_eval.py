"""eval.py: lm-eval's requests answered, its tasks run off-line, many processes as one, and what it
says to bad input."""

import functools
import json
import math
import re
import sys

import pytest
import torch
from scripts import ROOT, run, run_here, run_parallel
from tiny import tiny_checkpoint

from data.tokenizer import Tokenizer
from evaluation.likelihood import log_likelihood
from model import Config, Transformer

pytest.importorskip("lm_eval", reason="eval.py's benchmarks need lm-eval (requirements.txt has it)")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import eval as evaluation  # noqa: E402
from evaluation.evaluator import Answer, in_doubt, until  # noqa: E402
from evaluation.harness import harness_model  # noqa: E402

TASKS = (
    "--include_path=evaluation/tasks",
    "--tasks=stdlib_choice,stdlib_cloze,stdlib_text",
    "--limit=4",
    "--device=cpu",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model of bytes with a context of 512: long enough for the questions."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), max_len=512)


def only_our_tasks():
    """In a script's process: lm-eval without its own 14,000 tasks, which take ten seconds."""
    import lm_eval.tasks

    plain = lm_eval.tasks.TaskManager
    lm_eval.tasks.TaskManager = lambda *arguments, **options: plain(
        *arguments, **options | {"include_defaults": False}
    )


def offline():
    """In a script's process: what HF_HUB_OFFLINE=1 does. Without it the hub is asked five times."""
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def lm_of(folder, **settings):
    """What lm-eval gets from --model unmask."""
    return harness_model(evaluation.settings)(checkpoint=str(folder), device="cpu", **settings)


def requests_of(kind, *arguments, documents=None):
    return [
        Instance(kind, {}, a, 0, ("task", i if documents is None else documents[i], 1))
        for i, a in enumerate(arguments)
    ]


# ---- tasks ---------------------------------------------------------------------------------------


def test_local_tasks_on_one_process_and_on_two(checkpoint, tmp_path):
    """Multiple choice, generation and perplexity, off-line; the table and every number are the same
    for any number of processes."""
    alone = run("eval.py", f"--checkpoint={checkpoint}", *TASKS, f"--output={tmp_path}/one.json")
    assert alone.status == 0, alone.err
    for name in (
        "stdlib_choice",
        "acc_norm",
        "stdlib_cloze",
        "exact_match",
        "stdlib_text",
        "bits_per_byte",
        "nats_error",
        "forward passes",
    ):
        assert name in alone.out
    ranks = run_parallel(
        2, "eval.py", f"--checkpoint={checkpoint}", *TASKS, f"--output={tmp_path}/two.json"
    )
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert ranks[0].out == alone.out and ranks[1].out == ""
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"] and one["unmask"]["answers"] == two["unmask"]["answers"]
    assert (
        one["unmask"]["settings"]["tasks"] == "stdlib_choice,stdlib_cloze,stdlib_text"
        and one["unmask"]["passes"] == two["unmask"]["passes"] > 0
    )
    choice = [answer for answer in one["unmask"]["answers"] if answer["task"] == "stdlib_choice"]
    assert len(choice) == 16 and all(answer["nats"] < 0 <= answer["stderr"] for answer in choice)
    assert one["configs"]["stdlib_cloze"]["num_fewshot"] == 2 and one["n-samples"][
        "stdlib_text"
    ] == {"original": 40, "effective": 4}


@pytest.mark.parametrize("task", ["stdlib_choice", "tales_choice"])
def test_a_model_that_knows_the_answers_gets_them_right(checkpoint, monkeypatch, task):
    """The path from log p to accuracy: with log-likelihoods that favour the right choice acc is 1,
    and 0 with the opposite."""
    manager = TaskManager(include_path="evaluation/tasks", include_defaults=False)
    with open(f"evaluation/tasks/{task}.jsonl") as file:
        right = [" " + row["choices"][row["answer"]] for row in map(json.loads, file)]
    lm = lm_of(checkpoint)

    def score(sign, choices):
        values = {}
        for document, pairs in choices.items():
            for prefix, target in pairs:
                is_right = bytes(target).decode() == right[document[1]]
                values[document, prefix, target] = sign * float(is_right)
        return values

    for sign in (1, -1):
        monkeypatch.setattr(lm, "score", functools.partial(score, sign))
        results = simple_evaluate(
            lm, tasks=[task], task_manager=manager, limit=8, bootstrap_iters=0
        )["results"][task]
        assert results["acc,none"] == (1.0 if sign == 1 else 0.0)


@pytest.mark.parametrize("task, answer", [("stdlib_cloze", "result"), ("tales_answer", "answer")])
def test_an_answer_must_be_exact(checkpoint, monkeypatch, task, answer):
    """The path from what is generated to exact_match."""
    manager = TaskManager(include_path="evaluation/tasks", include_defaults=False)
    with open(f"evaluation/tasks/{task}.jsonl") as file:
        right = [row[answer] for row in map(json.loads, file)]
    lm = lm_of(checkpoint)
    for end, share in (("", 1.0), (" indeed", 0.0)):
        def generate_until(requests, end=end, **_):
            return [f"{right[request.doc_id]}{end}" for request in requests]

        monkeypatch.setattr(lm, "generate_until", generate_until)
        results = simple_evaluate(
            lm, tasks=[task], task_manager=manager, limit=8, bootstrap_iters=0
        )["results"][task]
        assert results["exact_match,none"] == share


def test_lm_evals_own_command_line(checkpoint, tmp_path):
    script = tmp_path / "harness.py"
    script.write_text("import eval\nfrom lm_eval.__main__ import cli_evaluate\ncli_evaluate()\n")
    result = run(
        script,
        "run",
        "--model",
        "unmask",
        "--model_args",
        f"checkpoint={checkpoint},num_samples=2,device=cpu",
        "--tasks",
        "stdlib_choice",
        "--include_path",
        "evaluation/tasks",
        "--limit",
        "2",
        before=only_our_tasks,
    )
    assert result.status == 0, result.err
    assert "|stdlib_choice|" in result.out


def test_groups_of_tasks(checkpoint, tmp_path):
    """A group in a group: each task once, and the groups in a table of their own."""
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(
            open("evaluation/tasks/stdlib_choice.yaml")
            .read()
            .replace("task: stdlib_choice", f"task: {name}")
        )
    aggregate = "aggregate_metric_list:\n  - metric: acc\n"
    (tmp_path / "inner.yaml").write_text(f"group: inner\ntask: [a]\n{aggregate}")
    (tmp_path / "outer.yaml").write_text(f"group: outer\ntask: [inner, b]\n{aggregate}")
    result = run(
        "eval.py",
        f"--checkpoint={checkpoint}",
        f"--include_path={tmp_path}",
        "--tasks=outer",
        "--limit=1",
        "--num_samples=1",
        "--device=cpu",
    )
    assert result.status == 0, result.err
    assert "|outer" in result.out and "- inner" in result.out and "Groups" in result.out


def test_code_runs_only_when_that_is_confirmed(checkpoint, tmp_path):
    (tmp_path / "unsafe.yaml").write_text(
        "task: unsafe\ndataset_path: json\ndataset_kwargs:\n"
        "  data_files: {test: evaluation/tasks/stdlib_cloze.jsonl}\ntest_split: test\n"
        "output_type: generate_until\nunsafe_code: true\ndoc_to_text: '{{code}}'\n"
        "doc_to_target: '{{result}}'\ngeneration_kwargs: {until: ['\\n'], max_gen_toks: 2}\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    arguments = (
        f"--checkpoint={checkpoint}",
        f"--include_path={tmp_path}",
        "--tasks=unsafe",
        "--limit=2",
        "--device=cpu",
    )
    refused = run("eval.py", *arguments)
    assert refused.status == 2 and refused.err.splitlines()[-1].startswith(
        "error: task unsafe runs what the model writes: add --confirm_run_unsafe_code"
    )
    assert run("eval.py", *arguments, "--confirm_run_unsafe_code").status == 0


# ---- the bound on a text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, kind",
    [
        ({}, "upper bound"),
        ({"block_length": 4}, "upper bound"),
        ({"causal": True, "shift": True}, "exact"),
    ],
)
def test_nelbo_of_a_text(settings, kind, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    folder = tiny_checkpoint(tmp_path / "model", max_len=64, **settings)
    result = run(
        "eval.py",
        f"--checkpoint={folder}",
        f"--dataset={text}",
        f"--output={tmp_path}/nelbo.json",
        "--device=cpu",
    )
    assert result.status == 0, result.err
    measured = json.loads((tmp_path / "nelbo.json").read_text())["nelbo"]
    assert result.out.splitlines()[-1] == (
        f"val nelbo {measured['nats_per_token']:.4f} +- {measured['stderr']:.4f} nats/token, "
        f"{measured['bits_per_byte']:.3f} bits/byte"
    )
    assert kind in result.out and measured["tokens"] > 500
    predicted = 63 if "causal" in settings else 64      # of a window: the first has no left context
    assert measured["tokens"] % predicted == 0
    assert 3 < measured["nats_per_token"] < 12 and measured["bits_per_byte"] == pytest.approx(
        measured["nats_per_token"] / math.log(2), rel=0.01
    )


def test_the_last_line_of_a_recipe_is_that_of_eval(tmp_path):
    """Training in bfloat16, both measure the stored weights with the same masks; that the seed and
    the number of tokens are those of the recipe is all one has to say. test_streams.py has the
    other recipes and objectives."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {n}th fox jumps over {n * n} lazy dogs.\n" for n in range(300)))
    trained = run(
        "train_scratch.py", f"--dataset={text}", f"--out_dir={tmp_path}/out", "--tokenizer=byte",
        "--dtype=bfloat16", "--device=cpu", "--compile=False",
        "--dim=16", "--n_layers=1", "--n_heads=1", "--seq_len=32", "--batch_size=4",
        "--max_steps=3", "--eval_interval=0", "--sample_tokens=0", "--final_eval_tokens=512",
        "--seed=5")
    assert trained.status == 0, trained.err
    line = trained.out.splitlines()[-1]
    assert line.startswith("val nelbo ")
    arguments = f"--checkpoint={tmp_path}/out", f"--dataset={text}", "--device=cpu", "--seed=5"
    assert run("eval.py", *arguments, "--max_tokens=512").out.splitlines()[-1] == line
    assert run("eval.py", *arguments).out.splitlines()[-1] != line, "another number of tokens"
    assert run("eval.py", *arguments, "--limit=16").out.splitlines()[-1] == line    # windows of 32


def test_a_bound_needs_no_benchmarks_and_one_window_has_no_error(tmp_path, monkeypatch):
    """lm-eval is for tasks; what is not known is null in the file, for NaN is no JSON."""
    monkeypatch.chdir(ROOT)
    text, output = tmp_path / "text.txt", tmp_path / "nelbo.json"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    folder = tiny_checkpoint(tmp_path / "model", max_len=9000)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)    # not installed
    result = run_here("eval.py", f"--checkpoint={folder}", f"--dataset={text}", "--device=cpu",
                      f"--output={output}")
    assert result.status == 0 and "+- nan" in result.out.splitlines()[-1], result
    assert json.loads(output.read_text(), parse_constant=pytest.fail)["nelbo"]["stderr"] is None


def test_conversations_need_tokens_that_the_model_has(published, talk, monkeypatch):
    """A checkpoint without a chat template gets those of ChatML, which its embedding lacks."""
    monkeypatch.chdir(ROOT)
    folder = published("qwen3")
    result = run_here("eval.py", f"--checkpoint={folder}", f"--dataset={talk}", "--device=cpu")
    words = f"and {folder} has 257 tokens: conversations need a checkpoint with a chat template"
    assert result.status == 2 and words in result.err.splitlines()[-1], result


def test_guidance_of_a_bound_is_refused(checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run_here("eval.py", f"--checkpoint={checkpoint}", "--device=cpu", "--cfg_scale=1")
    words = "cfg_scale is for tasks: the bound on a text has no prompt to guide it"
    assert (result.status, result.out) == (2, "") and words in result.err


def test_nelbo_divides_its_passes(checkpoint, text):
    arguments = (f"--checkpoint={checkpoint}", f"--dataset={text}", "--max_tokens=2000",
                 "--seq_len=32", "--device=cpu")
    ranks = run_parallel(2, "eval.py", *arguments)
    assert ranks[0].status == 0 and ranks[0].out == run("eval.py", *arguments).out


# ---- requests ------------------------------------------------------------------------------------

PAIRS = [
    ("a context", " answer"),
    ("trailing spaces  ", "answer"),
    ("tab\t\n", "x"),
    ("naïve café", " déjà"),
    ("日本", "語"),
    ("emoji 👩‍👩‍👧", "👧"),
    ("half a wo", "rd"),
    ("Question: 1+1?\nAnswer:", " 2"),
    ("  leading", " and  inner"),
    ("end ", " start"),
]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_contexts_and_answers_are_split_by_lm_evals_own_rule(kind, tmp_path):
    tokenizer = (
        Tokenizer.bytes()
        if kind == "bytes"
        else Tokenizer.train(
            ["a context answer trailing spaces half a word Question Answer start"] * 5, 300
        )
    )
    folder = tmp_path / kind
    Transformer(
        Config(
            vocab_size=tokenizer.vocab_size,
            dim=16,
            n_layers=1,
            n_heads=1,
            max_len=128,
            mask_token_id=tokenizer.mask_token_id,
        )
    ).init_weights().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lm = lm_of(folder)
    for context, answer in PAIRS:
        assert lm.tokens_of(context, answer) == tuple(
            super(type(lm), lm)._encode_pair(context, answer)
        ), (context, answer)


def test_log_likelihood_of_requests(checkpoint):
    """One token exactly; an empty context; several answers; is_greedy by greedy unmasking, where a
    document has one answer only."""
    lm = lm_of(checkpoint, num_samples="64")
    found = lm.loglikelihood(
        requests_of("loglikelihood", ("The", "x"), ("", "ab"), ("The", "cat"), documents=[0, 1, 2])
    )
    expected, errors = log_likelihood(
        lm.model, [list(b"The"), [], list(b"The")], [list(b"x"), list(b"ab"), list(b"cat")]
    )
    assert (errors == 0).all() and [value for value, _ in found] == pytest.approx(
        expected.tolist(), rel=1e-5
    )
    written = lm.generate_until(
        requests_of("generate_until", ("The", {"until": [], "max_gen_toks": 2}))
    )[0]
    greedy = lm.loglikelihood(
        requests_of("loglikelihood", ("The", written), ("The", written[::-1]), documents=[0, 1])
    )
    assert [is_greedy for _, is_greedy in greedy] == [True, written == written[::-1]]
    both = lm.loglikelihood(
        requests_of("loglikelihood", ("The", written), ("The", "qq"), documents=[0, 0])
    )
    assert [is_greedy for _, is_greedy in both] == [False, False] and both[0][0] == pytest.approx(
        greedy[0][0], rel=1e-5
    )


def test_requests_without_a_document_stand_alone(checkpoint):
    lm = lm_of(checkpoint)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in (("The", "x"), ("The", "cat"))]
    found = lm.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx(
        log_likelihood(lm.model, [list(b"The")] * 2, [list(b"x"), list(b"cat")])[0].tolist(),
        rel=1e-5,
    )
    assert lm.loglikelihood(
        [
            Instance(
                "loglikelihood",
                {},
                (
                    "The",
                    lm.generate_until(requests_of("generate_until", ("The", {"max_gen_toks": 2})))[
                        0
                    ],
                ),
                0,
            )
        ]
    )[0][1]


def test_auto_asks_more_only_where_the_rank_is_in_doubt(checkpoint):
    lm = lm_of(checkpoint)
    pairs = {
        (tuple(b"Is it"), target): 8
        for target in (tuple(b" answer1"), tuple(b" answer2"), tuple([255] * 8))
    }
    lm.score({("task", 0): pairs})
    samples = [answer["samples"] for answer in lm.answers]
    assert samples[2] == 8 if samples[2] < max(samples) else min(samples) >= 8


def answers_of(*documents):
    """Answers from [(value, variance, characters), ...] of each document."""
    return [
        Answer(("task", number), (), (), characters, value, variance)
        for number, document in enumerate(documents)
        for value, variance, characters in document
    ]


def test_whose_rank_is_in_doubt():
    first, second, far, alone = answers = answers_of(
        [(-10.0, 1.0, 1), (-10.5, 1.0, 1), (-30.0, 1.0, 1)], [(-5.0, 0.0, 1)]
    )
    assert in_doubt(answers) == [first, second]
    assert in_doubt(answers_of([(-10.0, 0.25, 1), (-14.0, 0.25, 2)])) == []
    by_length = answers_of([(-10.0, 0.25, 4), (-14.0, 0.25, 5)])  # -2.5 and -2.8 a character
    assert in_doubt(by_length) == by_length
    unknown = answers_of([(-10.0, math.nan, 1), (-10.5, math.nan, 1)])
    assert in_doubt(unknown) == [], "one sample has no error"


def test_estimates_are_averaged_and_what_is_exact_replaces_them():
    answer = Answer(("task", 0), (), (), 1)
    answer.add(-10.0, math.nan, 1)
    assert answer.record()["stderr"] is None
    answer.add(-8.0, 0.5, 3)
    assert (answer.value, answer.samples) == (-8.5, 4)
    assert answer.record()["stderr"] == pytest.approx(3 * 0.5 / 4)
    answer.add(-9.0, 0.0, 16)
    assert (answer.value, answer.variance, answer.samples) == (-9.0, 0.0, 16)


def test_rolling_adds_up_the_windows(tmp_path):
    """An autoregressive model: the chain rule over windows that overlap by one token, as lm-eval
    cuts them."""
    lm = lm_of(tiny_checkpoint(tmp_path / "causal", causal=True, shift=True, max_len=16))
    text = "twenty-four characters!!"
    (value,) = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", (text,)))
    tokens, total = [256, *text.encode()], 0.0  # after an end of text
    for begin, first, end in (
        (0, 1, 16),
        (9, 16, 25),
    ):  # windows of 16, the last one with as much context as fits
        logp = lm.model(torch.tensor([tokens[begin:end]])).log_softmax(-1)[0]
        total += sum(logp[i - 1 - begin, tokens[i]].item() for i in range(first, end))
    assert value == pytest.approx(total, rel=1e-5)


def test_stops_that_are_special_tokens(checkpoint, monkeypatch):
    """What a model writes after a stop must not reach a task's filter."""
    lm = lm_of(checkpoint)
    answer = lm.sampler.tokenizer.encode("It is 4!<|im_end|>\n5<|endoftext|>6", parse_special=True)
    monkeypatch.setattr(
        lm.sampler, "run", lambda prompts, arguments: [list(prompt) + answer for prompt in prompts]
    )
    for stops, text in (
        (["</s>", "<|im_end|>"], "It is 4!"),
        ("<|im_end|>", "It is 4!"),
        (["<|im_end|>\n5"], "It is 4!"),
        (["!<|im_end|>"], "It is 4"),
        (["<|im_end|>", "is"], "It "),
        (["<|im_start|>"], "It is 4!\n5"),
        (None, "It is 4!\n5"),
    ):
        assert lm.generate_until(
            requests_of("generate_until", ("The", {"until": stops, "max_gen_toks": 20}))
        ) == [text]


def test_generation_batches_by_settings_and_stops(checkpoint):
    lm = lm_of(checkpoint)
    requests = requests_of(
        "generate_until",
        *[
            (prompt, {"until": until, "max_gen_toks": count})
            for prompt, until, count in (
                ("The", [], 4),
                ("A longer prompt", [], 4),
                ("The", [], 7),
                ("The", "\n", 4),
            )
        ],
    )
    found = lm.generate_until(requests)
    for request, text in zip(
        requests, found
    ):  # each as it would be alone, and as sample.py would write it
        arguments = lm.sampler.arguments(
            request.args[1]["max_gen_toks"], lm.settings | {"temperature": 0.0}, chat=True
        )
        answer = lm.sampler.run([list(request.args[0].encode())], arguments)[0][
            len(request.args[0]) :
        ]
        assert (
            text == lm.sampler.decode(answer)[0].split("\n")[0]
            if request.args[1]["until"]
            else text == lm.sampler.decode(answer)[0]
        )
    assert until("one\n\ntwo STOP", ["STOP", "\n\n", ""]) == "one"
    sampled = requests_of(
        "generate_until",
        *[("The", {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0})] * 3,
    )
    texts = lm.generate_until(sampled)
    assert (
        len(set(texts)) > 1
        and texts == lm.generate_until(sampled)
        and texts[:1] == lm.generate_until(sampled[:1])
    )


def test_chat_templates_reach_the_model(checkpoint):
    """A question in the checkpoint's own format, control tokens as tokens."""
    lm = lm_of(checkpoint)
    asked = lm.apply_chat_template([{"role": "user", "content": "What?"}])
    assert (
        lm.tok_encode(asked)
        == lm.sampler.encode_chat([{"role": "user", "content": "What?"}])
        != lm.tok_encode("What?")
    )
    seen, manager = [], TaskManager(include_path="evaluation/tasks", include_defaults=False)
    lm.score = lambda choices: (
        seen.extend(
            bytes(b for b in prefix if b < 256).decode()
            for pairs in choices.values()
            for prefix, _ in pairs
        )
        or {(document, *pair): 0.0 for document in choices for pair in choices[document]}
    )
    for chat in (False, True):
        simple_evaluate(
            lm,
            tasks=["stdlib_choice"],
            task_manager=manager,
            limit=1,
            apply_chat_template=chat,
            bootstrap_iters=0,
        )
    assert (
        seen[0].startswith("Question: ")
        and seen[-1].startswith("user\nQuestion: ")
        and lm.settings["apply_chat_template"]
    )


# ---- bad input -----------------------------------------------------------------------------------


def test_data_that_is_not_here(checkpoint, tmp_path):
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\n"
    )
    result = run(
        "eval.py",
        f"--checkpoint={checkpoint}",
        f"--include_path={tmp_path}",
        "--tasks=far",
        "--device=cpu",
        before=offline,
    )
    line = result.err.splitlines()[-1]
    assert (
        result.status == 2
        and line.startswith("error: the data of task far cannot be loaded")
        and "nobody/nothing" in line
        and "copy" in line
    )


def test_a_model_without_a_mask_token(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    config, settings = (
        json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": None}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if name != "mask_token"})
    )
    result = run("eval.py", f"--checkpoint={folder}", "--device=cpu")
    assert (
        result.status == 2 and "has a mask token: convert it first" in result.err.splitlines()[-1]
    )


def test_what_is_too_long_loses_its_beginning_and_is_counted(tmp_path):
    folder = tiny_checkpoint(tmp_path / "short", max_len=32)
    lm, strict = lm_of(folder, num_samples=2), lm_of(folder, strict=True)
    long, cut = (
        requests_of("loglikelihood", ("x" * 40 + "the end of it: ", "yes")),
        requests_of("loglikelihood", (("x" * 40 + "the end of it:")[-28:], " yes")),
    )
    assert lm.loglikelihood(long)[0][0] == pytest.approx(lm.loglikelihood(cut)[0][0], rel=1e-5)
    assert (
        lm.generate_until(
            requests_of("generate_until", ("y" * 50, {"until": [], "max_gen_toks": 4}))
        )
        != []
    )
    assert lm.notes == {
        "a request is longer than the model's context of 32 tokens and lost its beginning": 2
    }
    with pytest.raises(ValueError, match="lost its beginning"):
        strict.loglikelihood(long)
    with pytest.raises(
        ValueError, match="an answer of 40 tokens does not fit into the model's context of 32"
    ):
        lm.loglikelihood(requests_of("loglikelihood", ("a", "b" * 40)))
    with pytest.raises(ValueError, match="64 tokens to write do not fit"):
        lm.generate_until(requests_of("generate_until", ("y", {"until": [], "max_gen_toks": 64})))


def test_an_empty_answer_is_certain_and_counted(checkpoint):
    lm = lm_of(checkpoint)
    assert lm.loglikelihood(requests_of("loglikelihood", ("context", ""))) == [(0.0, True)]
    assert list(lm.notes.values()) == [1]
    with pytest.raises(ValueError, match="an answer is empty"):
        lm_of(checkpoint, strict=True).loglikelihood(requests_of("loglikelihood", ("context", "")))


def test_an_answer_inside_a_token_of_its_context_is_not_certain(tmp_path):
    """lm-eval's rule leaves it no token, and lm-eval's own models end with an AssertionError."""
    tokenizer = Tokenizer.train(["half a word"] * 5, 300)
    sizes = dict(vocab_size=tokenizer.vocab_size, dim=16, n_layers=1, n_heads=1)
    model = Transformer(Config(**sizes, mask_token_id=tokenizer.mask_token_id)).init_weights()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm, (prefix, target) = lm_of(tmp_path), map(tokenizer.encode, ("half a wo", "rd"))
    assert lm.tokens_of("half a wo", "rd")[1] == []
    expected, _ = log_likelihood(model.eval(), [prefix], [target], 32)
    [(value, _)] = lm.loglikelihood(requests_of("loglikelihood", ("half a wo", "rd")))
    assert value == pytest.approx(expected.item(), rel=1e-5) and value < -1
    assert list(lm.notes.values()) == [1]


def test_a_text_cannot_spell_the_mask(checkpoint):
    lm = lm_of(checkpoint)
    spelled = lm.sampler.tokenizer.decode([lm.sampler.mask_id])
    assert lm.sampler.mask_id not in lm.tok_encode(f"a {spelled} b") and lm.tok_encode(
        "<|endoftext|>"
    ) == [256]


def test_a_user_who_spells_the_mask_leaves_the_templates_tokens_alone(checkpoint):
    """The chat's control tokens are tokens, the mask's spelling is text, also in answers."""
    lm = lm_of(checkpoint)
    asked = lm.apply_chat_template([{"role": "user", "content": "What is <|mask|>?"}])
    tokens = lm.tok_encode(asked)
    assert lm.sampler.mask_id not in tokens and lm.sampler.tokenizer.decode(tokens) == asked
    assert tokens.count(258) == 2 and tokens.count(259) == 1
    prefix, target = lm.tokens_of(asked, " <|mask|>")
    assert prefix + target == tokens + list(b" <|mask|>")  # cut before the last newline
    requests = requests_of("generate_until", (asked, {"until": [], "max_gen_toks": 2}))
    assert len(lm.generate_until(requests)) == 1


def test_an_answer_that_a_task_begins_is_gone_on_with(checkpoint):
    """lm-eval's gen_prefix: the last message of the assistant stays open."""
    lm = lm_of(checkpoint)
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is "}]
    text = lm.apply_chat_template(messages, add_generation_prompt=False)
    assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nIt is"
    assert lm.apply_chat_template(messages[:1]) + "It is" == text
    lm.sampler.tokenizer.chat_templates = {"default": "{{ messages[0].content }}"}
    with pytest.raises(ValueError, match="does not write how the answer should begin"):
        lm.apply_chat_template(messages, add_generation_prompt=False)


def test_an_unknown_setting_of_model_args(checkpoint):
    with pytest.raises(
        ValueError, match="no setting called 'chekpoint'; did you mean 'checkpoint'"
    ):
        harness_model(evaluation.settings)(chekpoint="x")


def test_passes_of_likelihoods_are_counted(checkpoint):
    """Of targets of one token each there is one pass, whatever it asks the model for."""
    result = run("eval.py", f"--checkpoint={checkpoint}", *TASKS, "--limit=1", "--device=cpu")
    passes, tokens = re.search(r"([\d,]+) forward passes, ([\d,]+) tokens", result.out).groups()
    assert result.status == 0 and int(passes.replace(",", "")) > 3
    assert int(tokens.replace(",", "")) > 100
