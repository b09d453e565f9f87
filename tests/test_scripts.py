"""What every script promises: --help prints each constant with its comment, a mistake is one line
and exit status 2, and the names that all of them share."""
import re

import pytest
from scripts import ROOT, run

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
    "sample.py": [*CHOSEN, "prompt", "infill", "num_samples", "max_new_tokens", "show", "html",
                  "chat", "serve"],
    "eval.py": [*CHOSEN, "tasks", "limit", "output", "dataset"],
}


@pytest.mark.parametrize("script", NAMES)
def test_help_prints_every_constant_and_its_comment(script):
    result = run(script, "--help")
    printed = dict(re.findall(r"^  --(\w+)=(.*)$", result.out, re.MULTILINE))
    source = (ROOT / script).read_text()
    assert result.status == 0 and result.err == ""
    assert result.out.startswith(source.split('"""')[1].strip().split("\n")[0])
    assert set(NAMES[script]) <= printed.keys()
    above = source.split("settings = common.override")[0]
    constants = re.findall(r"^([a-z]\w*) = .*?  # (.*)$", above, re.MULTILINE)
    assert [name for name, _ in constants] == list(printed)
    for name, comment in constants:
        assert printed[name].endswith(comment.strip()) and len(comment) > 3, name


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


@pytest.mark.parametrize("script", NAMES)
@pytest.mark.parametrize("argument, words", [
    ("--device=tpu", "device must be auto, cpu, mps or cuda, got 'tpu'"),
    ("--dtype=float16", "dtype must be auto, float32 or bfloat16, got 'float16'"),
    ("--threads=-1", "threads must be between 0 (torch's choice) and 1024, got -1"),
])
def test_a_value_that_cannot_be_is_one_line(script, argument, words, tmp_path):
    own = {"sample.py": "--checkpoint=checkpoints/mdlm", "eval.py": "--checkpoint=checkpoints/mdlm",
           "train_scratch.py": f"--out_dir={tmp_path}"}
    start = own.get(script, "--init_from=tiny")
    result = run(script, start, argument)
    assert result.status == 2 and result.out == "", result
    assert re.fullmatch(r"error: [^\n]*\n", result.err) and words in result.err, result.err
