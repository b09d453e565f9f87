"""The commands that README and docs quote name scripts that are there, and settings that these
have."""
import re
import shlex

import pytest
from conftest import ROOT
from test_experiments import constants_of

from experiments.bench import COMMANDS

PAGES = ["README.md", "checkpoints/README.md",
         *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python|torchrun [^\n`]*?) ([\w/]+\.py)\b([^\n`]*)")
RECIPES = {"train_scratch.py", "convert_bert.py", "convert_ar.py", "finetune_llada.py",
           "train_edits.py", "train_grpo.py", "sample.py", "eval.py"}
NOT_OURS = {"examples/dllm_generate/generate.py"}       # docs/serving.md shows what others offer


def commands_of(page):
    """[(script, its arguments)] that a page quotes; lines that end with a backslash go on."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = []
    for script, rest in COMMAND.findall(text):
        words = shlex.split(rest.replace("&&", "#").replace("|", "#"), comments=True)
        found.append((script, words))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_quoted_commands_can_be_typed(page):
    for script, words in commands_of(page):
        if script == "experiments/bench.py":
            assert words[0] in COMMANDS, f"{page}: {script} {words}"
        if script not in RECIPES:
            assert script in NOT_OURS or (ROOT / script).exists(), f"{page}: {script}"
            continue
        names = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        unknown = names - constants_of(script) - {"help"}
        assert not unknown, f"{page}: {script} has no {unknown}"


def test_pages_quote_commands():
    assert sum(len(commands_of(page)) for page in PAGES) > 150
