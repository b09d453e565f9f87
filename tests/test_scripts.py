"""What every script promises: --help prints each constant with its comment, a mistake is one line
and exit status 2, two processes are one, and the names that all of them share."""
import functools
import re

import lm_eval.tasks
import pytest
from runs import LAST_LINE, LAST_LINES, SETTINGS, equal, learned, refused, rows, succeed
from scripts import ROOT, run, run_here, run_parallel
from tiny import tiny_checkpoint

from training.run import Run

# DESIGN's names that every script shares where it has the thing.
RUN = ["out_dir", "dataset", "vocab_size", "seq_len", "batch_size", "grad_accum", "learning_rate",
       "max_steps", "max_minutes", "eval_interval", "resume", "seed", "device", "dtype", "compile",
       "wandb"]
SIZES = ["n_layers", "n_heads", "dim"]
CHOSEN = ["checkpoint", "adapter", "steps", "block_length", "temperature", "remasking", "threshold",
          "cache", "cfg_scale", "seed", "device", "dtype"]
NAMES = {
    "train_scratch.py": [*RUN, *SIZES, "tokenizer", "objective", "block_length"],
    "convert_bert.py": [*RUN, *SIZES, "init_from", "export"],
    "convert_ar.py": [*RUN, *SIZES, "init_from", "objective", "block_length", "export"],
    "finetune_llada.py": [*RUN, "init_from", "lora_rank", "lora_alpha", "plan", "merge"],
    "train_edits.py": [*RUN, *SIZES, "tokenizer", "init_from"],
    "train_grpo.py": ["init_from", "task", "reward", "lora_rank", "lora_alpha", "plan",
                      *[name for name in RUN if name not in ("dataset", "vocab_size",
                                                             "grad_accum")]],
    "sample.py": [*CHOSEN, "prompt", "infill", "num_samples", "max_new_tokens", "show", "html",
                  "chat", "serve"],
    "eval.py": [*CHOSEN, "tasks", "limit", "output", "dataset"],
}


@pytest.mark.parametrize("script", NAMES)
def test_help_prints_every_constant_and_its_comment(script):
    result = run(script, "--help")
    lines = re.findall(r"^  --(\w+)=(.*)$", result.out, re.MULTILINE)
    printed = dict(lines)
    source = (ROOT / script).read_text()
    assert result.status == 0 and result.err == "" and len(lines) == len(printed)
    assert result.out.startswith(source.split('"""')[1].strip().split("\n")[0])
    assert set(NAMES[script]) <= printed.keys()
    above = source.split("settings = common.override")[0]
    constants = re.findall(r"^([a-z]\w*) = .*?  # (.*)$", above, re.MULTILINE)
    assert [name for name, _ in constants] == list(printed)
    for name, comment in constants:
        assert printed[name].endswith(comment.strip()) and len(comment) > 3, name


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("script", NAMES)
@pytest.mark.parametrize("argument, words", [
    ("--sed=1", "error: no setting called 'sed'; did you mean 'seed'? (--help lists all)\n"),
    ("--seed=x", "error: seed takes an int, got 'x' (default 1337)\n"),
    ("--seed", "error: --seed needs a value: --seed=1337\n"),
    ("seed=1", "error: expected --name=value, got 'seed=1'\n"),
])
def test_a_mistake_on_the_command_line_is_one_line(script, argument, words):
    result = run(script, argument)
    assert (result.status, result.out, result.err) == (2, "", words)


# What no script takes, whatever it does.
IMPOSSIBLE = [
    ("--device=tpu", "device must be auto, cpu, mps, cuda or cuda:N, got 'tpu'"),
    ("--dtype=float16", "dtype must be auto, float32 or bfloat16, got 'float16'"),
    ("--threads=-1", "threads must be between 0 (torch's choice) and 1024, got -1"),
]
# A script's own: the arguments, the words of the error line. FOLDER has FILES, BERT and so on are
# published checkpoints.
MISTAKES = {
    "train_scratch.py": [
        ("--wieght_decay=0.1", "no setting called 'wieght_decay'", "did you mean 'weight_decay'"),
        ("--n_layers=1e3", "n_layers takes an int, got '1e3' (default "),
        ("--learning_rate=fast", "learning_rate takes a float"),
        ("--resume=perhaps", "resume takes True or False"),
        ("--objective=gpt", "objective must be one of mdlm, bd3lm, ar, got 'gpt'"),
        ("--compile=maybe", "compile takes True or False, got 'maybe'"),
        ("--max_steps=0 --max_minutes=0", "max_steps and max_minutes are both 0"),
        ("--schedule=quadratic", "linear, cosine, polynomial"),
        ("--optimizer=sgd", "optimizer must be one of muon, adamw, got 'sgd'"),
        ("--decay=sudden", "decay must be one of linear, cosine, got 'sudden'"),
        ("--objective=bd3lm --block_length=5", "block_length 5 does not divide seq_len 16"),
        ("--objective=bd3lm --block_length=0", "block_length 0"),
        ("--objective=ar --seq_len=1", "seq_len must be at least 2"),
        ("--dim=15", "dim 15 does not divide into 2 heads"),
        ("--dim=6", "head size must be even"),
        ("--n_layers=-1", "n_layers must be at least 1, got -1"),
        ("--batch_size=-4", "batch_size must be at least 1, got -4"),
        ("--grad_accum=0", "grad_accum must be at least 1, got 0"),
        ("--max_steps=-1", "max_steps"),
        ("--max_minutes=-1", "max_minutes"),
        ("--learning_rate=0", "learning_rate must be positive, got 0.0"),
        ("--grad_clip=-1", "grad_clip"),
        ("--eval_interval=-1", "eval_interval"),
        ("--max_weight=-1", "max_weight"),
        ("--warmup=2", "warmup must be between 0 and 1, got 2.0"),
        ("--beta2=1", "beta2 must be at least 0 and below 1, got 1.0"),
        ("--sample_tokens=-1", "sample_tokens"),
        ("--seed=99999999999999999999", "seed"),
        ("--seq_len=100000", "the val split of easy",
         "a sequence 100,000: take a smaller seq_len or more text"),
        ("--tokenizer=bytes", "no tokenizer called 'bytes'", "did you mean 'byte'"),
        ("--tokenizer=bpe --vocab_size=200", "vocab_size is 200"),
        ("--dataset=pydoc", "no data set, file or folder called 'pydoc'", "did you mean 'pydocs'"),
        ("--dataset=FOLDER/empty.txt", "empty.txt is empty"),
        ("--dataset=FOLDER/short.txt", "short.txt", "too short"),
        ("--dataset=FOLDER/shorter.txt", "shorter",
         "a sequence 16: take a smaller seq_len or more text"),
        ("--dataset=FOLDER/latin.txt", "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
        ("--dataset=FOLDER/pictures", "no text in the folder"),
        ("--out_dir=FOLDER/empty.txt/below", "cannot write to out_dir",
         "choose another with --out_dir=..."),
        ("--out_dir=/proc/nothing", "cannot write to out_dir /proc/nothing"),
    ],
    "convert_bert.py": [
        ("--warmup=2", "warmup must be between 0 and 1, got 2.0"),
        ("--init_from=QWEN3", "is an autoregressive model (qwen3)", "convert_ar.py"),
        ("--init_from=tiny:gpt2", "convert_ar.py"),
        ("--init_from=LLADA", "is no BERT, RoBERTa or ModernBERT", "llada"),
        ("--init_from=BERT --seq_len=97", "positions for 96 tokens", "--seq_len=96"),
        ("--init_from=nowhere/at-all", "nowhere/at-all"),
        ("--padding=none", "padding must be one of eos, hidden, got 'none'"),
        ("--epochs=inf", "epochs must be finite, got inf"),
        ("--init_from=BERT --seq_len=8", "fill the context of 8 tokens"),
        ("--learning_rate=-1", "must be positive"),
        ("--dataset=FOLDER/broken.jsonl", "broken.jsonl, line 2 is not JSON"),
        ("--dataset=FOLDER/robot.jsonl", "robot.jsonl, line 1", "unknown role 'robot'"),
    ],
    "convert_ar.py": [
        ("--warmup=2", "warmup must be between 0 and 1, got 2.0"),
        ("--init_from=BERT", "sees in both directions already (bert)", "convert_bert.py"),
        ("--init_from=tiny:bert", "convert_bert.py"),
        ("--init_from=tiny:gpt5", "no family called 'gpt5'"),
        ("--padding=none", "padding must be one of eos, hidden, got 'none'"),
        ("--epochs=inf", "epochs must be finite, got inf"),
        ("--objective=bd3lm --block_length=7", "block_length 7 does not divide seq_len 96"),
        ("--objective=bd3lm --padding=hidden", "padding=hidden"),
        ("--block_schedule=1,4", "block_schedule is for objective bd3lm"),
        ("--objective=bd3lm --block_schedule=1,4,x", "block_schedule is a list like", "'x'"),
        ("--objective=bd3lm --block_length=8 --block_schedule=1,4",
         "block_schedule 1,4 must end with block_length 8"),
        ("--objective=bd3lm --block_length=8 --block_schedule=1,5,8",
         "its lengths must divide seq_len 96"),
        ("--objective=ar", "objective must be one of mdlm, bd3lm, got 'ar'"),
        ("--dataset=FOLDER/silent.jsonl", "silent.jsonl", "no response"),
        ("--dataset=alpakka[train:5]", "alpakka"),
    ],
    "finetune_llada.py": [
        ("--plan=True --dtype=fp32", "dtype must be auto, float32 or bfloat16, got 'fp32'"),
        ("--plan=True --ranks=8 --replicas=3", "replicas must divide the 8 processes, got 3"),
        ("--plan=True --init_from=QWEN3", "is an autoregressive model (qwen3)", "convert_ar.py"),
        ("--warmup=2", "warmup must be between 0 and 1, got 2.0"),
        ("--padding=none", "padding must be one of eos, hidden, got 'none'"),
        ("--epochs=inf", "epochs must be finite, got inf"),
        ("--base_bits=3", "base_bits must be 16 (the base as dtype says) or 4 (NF4), got 3"),
        ("--replicas=3", "replicas must divide the 1 processes, got 3"),
        ("--cart=2", "cart must be between 0 and 1, got 2.0"),
        ("--init_from=QWEN3", "is an autoregressive model (qwen3): see convert_ar.py"),
        ("--init_from=BERT --seq_len=97", "has a context of 96 tokens", "--seq_len=96"),
        ("--init_from=tiny:qwen3", "is an autoregressive model (qwen3): see convert_ar.py"),
        ("--init_from=tiny:llada2 --seq_len=80", "blocks of 32 tokens", "divide seq_len 80"),
        ("--init_from=tiny:llada2 --cart=0.1", "cart and padding=hidden are for models that see"),
        ("--init_from=tiny:llada2 --t_low=0.8", "0 <= t_low < t_high <= 1, got 0.8 and 0.8"),
        ("--init_from=tiny:llada2 --cap_weight=-1", "cap_weight must not be negative"),
        ("--init_from=tiny:llada2 --block_weights=1/t", "block_weights must be one of mean, bound"),
        ("--init_from=LLADA --cap_weight=0.1", "cap_weight is for models that write in blocks"),
    ],
    "train_edits.py": [
        ("--warmup=2", "warmup must be between 0 and 1, got 2.0"),
        ("--source=noise", "source must be one of nothing, masks, damage, gap, mixed, got 'noise'"),
        ("--schedule=even", "schedule must be one of linear, cubic, cube, cosine, got 'even'"),
        ("--seq_len=1", "seq_len must be at least 2, a token to begin with and one of text"),
        ("--editing=words", "editing must be one of flows, tokens, replace, got 'words'"),
        ("--editing=tokens --edit_threshold=2", "edit_threshold must be between 0 and 1, got 2.0"),
        ("--editing=replace --schedule=linear", "schedule is of --editing=flows: replace knows no"),
        ("--editing=tokens --init_from=QWEN3", "has no end of text or no mask to fill a block"),
        ("--editing=tokens --init_from=LLADA --seq_len=999", "a context of 96 tokens: take"),
        ("--time_features=7", "time_features are pairs of a sine and a cosine"),
        ("--max_damage=0", "max_damage must be at least 1, got 0"),
        ("--max_steps=0 --max_minutes=0", "max_steps and max_minutes are both 0"),
        ("--dataset=sudoku4 --tokenizer=bpe", "the tokenizer of sudoku4 has no token to"),
        ("--dataset=FOLDER/robot.jsonl", "holds conversations, and this recipe learns from whole"),
        ("--init_from=QWEN3", "a qwen3 model that reads from left to right cannot edit"),
        ("--init_from=LLADA --seq_len=64", "texts grow to twice seq_len 64: take --seq_len=48"),
        ("--init_from=BERT --seq_len=48 --max_damage=49",
         "has positions for 96 tokens, and damaged texts grow to 97: take --max_damage=48"),
        ("--source=masks --num_masks=32",
         "num_masks 32 and the token before them do not fit into the context of 32"),
        ("--init_from=tiny:qwen3", "a qwen3 model that reads from left to right cannot edit"),
    ],
    "train_grpo.py": [
        ("--plan=True --dtype=fp32", "dtype must be auto, float32 or bfloat16, got 'fp32'"),
        ("--warmup=2", "warmup must be between 0 and 1, got 2.0"),
        ("--estimator=exact", "estimator must be one of diffu, coupled, trace, bound"),
        ("--objective=spg", "--estimator=bound"),
        ("--group_size=1", "group_size must be at least 2, got 1"),
        ("--reference=BERT", "reference is what the KL is measured from, and beta=0 has none"),
        ("--threshold=0.9 --init_from=LLADA", "threshold and factor need low_confidence"),
        ("--block_length=9 --init_from=LLADA", "must be between 1 and max_new_tokens"),
        ("--max_steps=0 --max_minutes=0", "max_steps and max_minutes are both 0"),
        ("--mean=median", "mean must be one of tokens, answers, constant"),
        ("--task=tale", "no task called 'tale'; did you mean 'tales'?"),
        ("--task=sudoku6:99", "sudoku6 has from 1 to 36 blanks, got '99'"),
        ("--task=sudoku6 --reward=task --init_from=LLADA",
         "writes texts, which task sudoku6 is not for"),
        ("--task=FOLDER/robot.jsonl", 'robot.jsonl, line 1 has no "prompt", a text'),
        ("--task=FOLDER/mute.jsonl", 'mute.jsonl, line 2 has no "answer", a text'),
        ("--reward=countdown --init_from=LLADA", "the reward countdown reads numbers and target of "
         "a question, and this task has no numbers"),
        ("--reward=FOLDER/bad.py", "bad.py and no function of it: take"),
        ("--reward_seconds=inf", "reward_seconds must be at most 1e6, got inf"),
        ("--beta2=1 --init_from=LLADA", "beta2 must be at least 0 and below 1, got 1.0"),
        ("--reward=exakt", "no reward called 'exakt'; did you mean 'exact'?"),
        ("--reward=task", "the task has no reward of its own"),
        ("--reward=nowhere.py:f", "there is no nowhere.py"),
        ("--reward=FOLDER/bad.py:other", "has no function called 'other'"),
        ("--max_new_tokens=96 --init_from=LLADA", "do not fit into seq_len 96",
         "take a smaller max_new_tokens"),
        ("--init_from=QWEN3", "is an autoregressive model (qwen3): convert_ar.py"),
        ("--init_from=LLADA --lora_rank=2 --beta=0.1 --reference=BERT",
         "is not the policy's base: adapters belong to"),
        ("--init_from=LLADA --beta=0.1 --reference=BERT", "is not the policy's base: a bert of"),
    ],
    "sample.py": [
        ("--steps=1 --block_length=4 --max_new_tokens=8", "too few for 2 blocks"),
        ("--steps=-1", "steps must be between 1"),
        ("--block_length=-1", "block_length must be"),
        ("--block_length=9 --max_new_tokens=8", "block_length must be between 1 and"),
        ("--temperature=-1", "temperature must not be negative"),
        ("--temperature=warm", "temperature takes a number or auto"),
        ("--temperature=nan", "temperature"),
        ("--threshold=1.5", "threshold must be between 0 and 1"),
        ("--threshold=0.5 --remasking=random", "low_confidence"),
        ("--threshold=0.5 --factor=1", "exclude each other"),
        ("--cfg_scale=1 --cache=prefix", "cfg_scale works without a cache"),
        ("--cache=None", "cache must be one of auto, none, prefix, dual, block, got 'None'"),
        ("--remasking=best", "remasking must be one of"),
        ("--schedule=fast", "schedule must be one of even, timesteps, got 'fast'"),
        ("--top_p=-0.1", "top_p must be between 0 and 1"),
        ("--top_k=-1", "top_k must be at least 1"),
        ("--alg_temp=-1", "alg_temp must not be negative"),
        ("--alg_temp=1 --remasking=ancestral", "needs a rule that asks the model"),
        ("--entropy_bound=-1", "entropy_bound must not be negative"),
        ("--entropy_bound=1 --threshold=0.5", "exclude each other"),
        ("--remask=2", "remask must be between 0 and 1"),
        ("--remask=0.1 --remasking=margin", "remask needs remasking ancestral"),
        ("--remask_schedule=often", "remask_schedule must be one of cap, rescale"),
        ("--suppress=eos,nothing", "suppress takes ids or names of tokens, eos or eot, separated "
                                   "by commas, got 'nothing'"),
        ("--defer=99999", "outside the vocabulary"),
        ("--prompt=a[MASK:3]b", "contains [MASK:3] at character 1"),
        ("--infill=nothing", "nothing to fill"),
        ("--infill=[MASK:0]", "between 1 and the context"),
        ("--infill=[MASK:99999999999999999999]", "between 1 and the context"),
        ("--infill=[MASK:100]and[MASK:100]", "exceed"),
        ("--max_new_tokens=-1", "max_new_tokens"),
        ("--max_new_tokens=129", "exceed the context of 128"),
        ("--num_samples=0", "num_samples must be at least 1"),
        ("--prompt=a --infill=[MASK]", "choose one of"),
        ("--chat --html=x.html", "--html"),
        ("--dtype=int8", "dtype must be"),
        ("--weights=int3", "weights must be one of full, int8, got 'int3'"),
        ("--weights=int8 --adapter=FOLDER", "cannot be added to 8-bit weights"),
        ("--html=/nowhere/t.html", "cannot write a page to /nowhere/t.html"),
        ("--html=/tmp", "cannot write a page to /tmp"),
        ("--prompt=caf\udce9", "the prompt is not UTF-8 at byte 3"),
        ("--prompt=FILE:FOLDER/latin.txt", "latin.txt is not UTF-8 at byte 3"),
        ("--prompt=FILE:/nowhere", "cannot read /nowhere: No such file or directory"),
        ("--infill=FILE:FOLDER", "cannot read ", "Is a directory"),
        ("--serve=99999", "port between 1 and 65535"),
        ("--promt=x", "did you mean 'prompt'"),
        ("--temp=1", "did you mean 'temperature'"),
        ("--checkpoint=out/never_trained", "run python train_scratch.py first"),
    ],
    "eval.py": [
        ("--tasks=stdlib_chioce --include_path=evaluation/tasks",
         "no task called 'stdlib_chioce'; did you mean stdlib_choice"),
        ("--tasks=", "tasks is empty"),
        ("--tasks=piqa --include_path=nowhere", "include_path nowhere is no folder"),
        ("--num_samples=none", "num_samples takes a number of at least 1 or auto, got 'none'"),
        ("--checkpoint=out/nothing", "there is no out/nothing yet"),
        ("--output=nowhere/results.json", "cannot write results to nowhere/results.json"),
        ("--dataset=pydox",
         "no data set, file or folder called 'pydox'; did you mean 'pydocs'?"),
        ("--dtype=int8", "dtype must be auto, float32 or bfloat16"),
        ("--limit=-1", "limit must be between 0"),
        ("--limit=nan", "limit must be between 0"),
        ("--seed=4294967296", "seed must be between"),
        ("--max_tokens=0", "max_tokens must be between 1"),
        ("--remasking=best", "remasking must be one of"),
        ("--estimator=exact", "estimator must be one of"),
    ],
}
FILES = {
    "empty.txt": b"",
    "short.txt": b"a",
    "shorter.txt": b"too short a text for that",
    "latin.txt": "Un été.".encode("latin-1") * 99,
    "pictures/a.png": b"\x89PNG",
    "broken.jsonl": b'{"prompt": "a", "response": "b"}\n{"messages": \n',
    "robot.jsonl": b'{"messages": [{"role": "robot", "content": "a"}]}\n',
    "silent.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n',
    "bad.py": b"def raises(prompt, answer, reference): return 1 / 0\n",
    "mute.jsonl": b'{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n',
}


def every_mistake():
    """(script, arguments, words) of both tables."""
    found = []
    for script in NAMES:
        for arguments, *words in [*IMPOSSIBLE, *MISTAKES[script]]:
            name = f"{script} {ascii(arguments)}"
            found.append(pytest.param(script, arguments, words, id=name))
    return found


def filled(arguments, published):
    """The arguments with folders in place of the names of families."""
    for family in ("bert", "llada", "qwen3"):
        if f"={family.upper()}" in arguments:
            arguments = arguments.replace(family.upper(), str(published(family)))
    return arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with FILES."""
    path = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("script, arguments, words", every_mistake())
def test_a_mistake_is_one_line(script, arguments, words, small, checkpoint, folder, published,
                               tmp_path, monkeypatch):
    """In this process: tests above start one of its own."""
    arguments = filled(arguments.replace("FOLDER", str(folder)), published)
    start = [script, f"--checkpoint={checkpoint}"]
    if script in SETTINGS:
        start = small(script, tmp_path / "out")
    if script == "eval.py":     # lm-eval without its own 14,000 tasks, which take ten seconds
        ours = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", ours)
    monkeypatch.chdir(ROOT)
    result = run_here(*start, *arguments.split(" "))
    assert refused(result, *words)
    left = tmp_path / "out"
    assert not left.exists() or not list(left.iterdir())


@pytest.mark.parametrize("script", SETTINGS)
def test_what_does_not_say_when_to_stop_is_named(script, small, tmp_path, monkeypatch):
    """A run that ends for another reason: an impossible device, told after the notes."""
    start, notes = small(script, tmp_path / "out", "--device=tpu", "--max_minutes=1"), []
    if "\nepochs = " in (ROOT / script).read_text():
        start.append("--epochs=2")
        notes = ["epochs has no effect with max_steps 6 and max_minutes 1.0"]
    monkeypatch.chdir(ROOT)
    lines = run_here(*start).err.splitlines()
    assert lines[:-1] == [f"note: {note}" for note in (
        "max_minutes has no effect with max_steps 6", *notes)]
    lines = run_here(*start, "--max_steps=0").err.splitlines()
    assert lines[:-1] == [f"note: {note.replace('6', '0')}" for note in notes]


# --------------------------------------------------------------------------------------------------
# Many processes

# The same eight sequences of a step: in several passes, and on two processes.
ACCUMULATED = [1, "--batch_size=2", "--grad_accum=4"]
PARALLEL = [2, "--batch_size=4"]
BOTH = [2, "--batch_size=2", "--grad_accum=2"]
ADAMW = "--optimizer=adamw --learning_rate=1e-3"
# Script, settings, ways, tolerance of losses and of weights.
TWO_PROCESSES = [
    ("train_scratch.py", ADAMW, [ACCUMULATED, PARALLEL, BOTH], 2e-5, 2e-5),
    ("train_scratch.py", f"{ADAMW} --objective=bd3lm", [ACCUMULATED, BOTH], 2e-5, 2e-5),
    ("train_scratch.py", f"{ADAMW} --objective=ar", [ACCUMULATED, BOTH], 2e-5, 2e-5),
    ("convert_bert.py", ADAMW, [ACCUMULATED, BOTH], 2e-5, 2e-4),
    ("convert_ar.py", f"{ADAMW} --padding=hidden --anneal_steps=4", [ACCUMULATED, BOTH],
     2e-5, 2e-4),
    ("convert_ar.py", f"{ADAMW} --objective=bd3lm --block_length=8 --anneal_steps=0",
     [ACCUMULATED, BOTH], 2e-5, 2e-4),
    ("train_edits.py", ADAMW, [ACCUMULATED, BOTH], 2e-5, 2e-5),
    ("train_edits.py", f"{ADAMW} --editing=tokens", [ACCUMULATED, BOTH], 2e-5, 2e-5),
    ("finetune_llada.py", "--init_from=LLADA --lora_dropout=0", [PARALLEL, BOTH], 1e-4, 1e-3),
    ("finetune_llada.py", "--init_from=LLADA --lora_dropout=0 --lora_rank=0", [BOTH], 1e-4, 1e-3),
    ("finetune_llada.py", "--init_from=tiny:llada2 --lora_dropout=0 --complement=False", [BOTH],
     1e-4, 1e-3),
    ("train_grpo.py", "--init_from=LLADA --max_steps=2 --eval_interval=1 --reward=LETTERS",
     [[2, "--batch_size=6"]], 1e-4, 1e-3),
    # Dropout is drawn for each pass, so that here the passes must be the same.
    ("finetune_llada.py", "--fsdp=False --batch_size=2 --grad_accum=4", [BOTH], 1e-5, 1e-4),
]


@pytest.mark.parametrize("script, settings, ways, of_losses, of_weights", TWO_PROCESSES)
def test_two_processes_are_one(script, settings, ways, of_losses, of_weights, small, published,
                               letters, tmp_path):
    """Answers differ in length, so this holds only because sums are divided by the counts of the
    whole step, and the noise belongs to the rows, whoever has them."""
    settings = settings.replace("LETTERS", str(letters))
    settings = filled(settings, published).split(" ")
    succeed(run(*small(script, tmp_path / "whole", "--batch_size=8", *settings)))
    for number, *way in ways:
        folder = tmp_path / f"{number}{way}"
        arguments = small(script, folder, *settings, *way)
        first, *others = run_parallel(number, *arguments) if number > 1 else [run(*arguments)]
        succeed(first, *others)
        assert LAST_LINES.get(script, LAST_LINE).fullmatch(first.out.splitlines()[-1])
        assert all(other.out == other.err == "" for other in others)
        assert equal(rows(folder), rows(tmp_path / "whole"), of_losses), way
        assert equal(learned(folder), learned(tmp_path / "whole"), of_weights), way


# --------------------------------------------------------------------------------------------------
# Started anew


@pytest.mark.parametrize("script", ["convert_bert.py", "convert_ar.py", "train_edits.py",
                                    "train_grpo.py"])
def test_torchrun_starts_it_anew(script, small, tmp_path, monkeypatch):
    """With the same command, --resume=False: the run goes on, and ends as one that was never
    disturbed. How torchrun does it stands in test_scale.py."""
    monkeypatch.chdir(ROOT)
    settings = ["--max_steps=3", "--eval_interval=1", "--sample_tokens=0"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed(run_here(*small(script, whole, *settings)))
    goes_on = Run.goes_on
    monkeypatch.setattr(Run, "goes_on", lambda run: run.step < 2 and goes_on(run))     # then killed
    succeed(run_here(*small(script, cut, *settings)))
    monkeypatch.setattr(Run, "goes_on", goes_on)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    succeed(run_here(*small(script, cut, *settings)))
    assert rows(cut) == rows(whole) and len(rows(cut)) >= 3
    assert equal(learned(cut), learned(whole))
