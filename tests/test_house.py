"""The house itself: imports point one way, a copied recipe runs, and ruff has nothing to say."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
from runs import forget_the_repository
from scripts import ROOT, run

# What the modules of each part may import, besides those of their own part.
BELOW_SAMPLING = ["common", "data", "kernels", "model", "passes", "noises", "diffusion", "edits",
                  "edit_tokens", "policy", "pretrained", "training"]
MAY_IMPORT = {
    "common": [],
    "config": [],
    "data": ["common"],
    "kernels": ["common"],
    "model": ["common", "config", "kernels"],
    "passes": ["kernels"],
    "noises": ["common", "passes"],
    "diffusion": ["common", "passes", "noises"],
    "edits": ["common", "kernels", "passes", "diffusion"],
    "edit_tokens": ["kernels", "passes", "diffusion", "edits"],
    "policy": ["passes"],
    "pretrained": ["common", "config", "model"],
    "training": ["common", "data", "kernels", "model", "passes", "diffusion", "edits",
                 "edit_tokens", "policy", "pretrained"],
    "sampling": BELOW_SAMPLING,
    "evaluation": [*BELOW_SAMPLING, "sampling"],
}
RECIPES = [
    "train_scratch",
    "convert_bert",
    "convert_ar",
    "finetune_llada",
    "train_edits",
    "train_grpo",
    "sample",
    "eval",
    "experiments",
]
# Imports against that direction, each inside the function that needs it: (from, to).
INSIDE_FUNCTIONS = {
    ("model", "pretrained.load"),  # Transformer.from_pretrained, and `python model.py FOLDER`
    ("model", "pretrained.export"),  # Transformer.save_pretrained, export_pretrained
    ("data.tokenizer", "pretrained.tokenizer_files"),  # a tokenizer that is not ours
    ("data.selfmade", "pretrained.hub"),  # the teacher's weights
    ("data.selfmade", "sampling.sampler"),  # the teacher, who answers
    ("pretrained.load", "training.lora"),  # a folder that holds an adapter
}
# What scripts of others import, whatever file the work is done in.
NAMES = {
    "model": ["Config", "Transformer"],
    "diffusion": ["mdlm_loss", "block_loss", "sft_loss", "llada2_loss", "ar_loss", "nelbo",
                  "denoise", "restored", "uniform_loss", "hybrid_loss", "mask_token_id",
                  "SCHEDULES", "STEP_SCHEDULES", "REMASKING"],
    "noises": ["uniform_bound", "hybrid_bound", "uniform_step", "hybrid_step", "reverse"],
    "sampling.engine": ["generate", "infill"],
    "evaluation.likelihood": ["log_likelihood"],
    "edits": ["align", "edit_loss", "edit_nelbo", "flow", "FLOW_SCHEDULES"],
    "policy": ["group_advantages", "policy_loss", "wd1_loss"],
    "data.tales": ["check"],
    "data.prepare": ["prepare"],
    "data.tokenizer": ["Tokenizer"],
    "data.chat": ["render"],
    "training.lora": ["load_adapter", "merge_lora"],
}
# This module imports common alone: our own layout is written without pretrained/ too.
LEAVES = {"training.files"}


@dataclass(frozen=True)
class Import:
    """`source`, a module, imports the module `target`; at_once: as soon as it is imported."""

    source: str
    target: str
    at_once: bool


def part_of(module):
    return module.split(".")[0]


def modules():
    """{name: file} of all modules but the tests."""
    found = {}
    for part in [*MAY_IMPORT, *RECIPES]:
        files = [ROOT / f"{part}.py", *(ROOT / part).rglob("*.py")]
        for file in files:
            if file.is_file():
                name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = file
    return found


def targets(node, known):
    """The modules of the house that an import statement names; a part of it that does not exist is
    named too."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in known else node.module for name in inside]
    return {name for name in names if part_of(name) in MAY_IMPORT or name in known}


def imports_of(source, file, known):
    """Every Import of a module, those inside functions and of `if __name__ == "__main__"` too."""
    found = set()

    def walk(node, at_once):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets(node, known):
                found.add(Import(source, target, at_once))
        is_main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_main:
            at_once = False
        for child in ast.iter_child_nodes(node):
            walk(child, at_once)

    walk(ast.parse(file.read_text(encoding="utf-8")), True)
    return found


@pytest.fixture(scope="module")
def imports():
    known = modules()
    found = set()
    for source, file in known.items():
        found |= imports_of(source, file, known)
    return found


def is_exception(one):
    if one.target in LEAVES:
        return True
    return not one.at_once and (one.source, one.target) in INSIDE_FUNCTIONS


def test_every_module_that_is_imported_exists(imports):
    known = modules()
    missing = {f"{one.source} imports {one.target}" for one in imports if one.target not in known}
    assert not missing


def test_imports_point_one_way(imports):
    wrong = set()
    for one in imports:
        source, target = part_of(one.source), part_of(one.target)
        allowed = [source, *MAY_IMPORT.get(source, [*MAY_IMPORT, *RECIPES])]
        if target not in allowed and not is_exception(one):
            wrong.add(f"{one.source} imports {one.target}")
    assert not wrong


def test_leaves_import_common_alone(imports):
    for one in imports:
        assert one.source not in LEAVES or one.target == "common", one


def test_no_module_stands_in_a_circle(imports):
    """Not even one that is closed inside a function, but for INSIDE_FUNCTIONS."""
    edges = {}
    for one in imports:
        if not is_exception(one) or one.target in LEAVES:
            edges.setdefault(one.source, set()).add(one.target)

    def reached(module):
        seen, todo = set(), [module]
        while todo:
            for target in edges.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        return seen

    assert not [module for module in edges if module in reached(module)]


@pytest.mark.parametrize("module", NAMES)
def test_names_that_others_call_stay_where_they_are(module):
    missing = [name for name in NAMES[module] if not hasattr(importlib.import_module(module), name)]
    assert not missing


def test_the_walk_sees_what_is_wrong(tmp_path):
    """Imports at the top, in functions, of a module's part and of what does not exist."""
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\nimport kernels\nfrom data import loader\n"
        "def f():\n    from pretrained.load import load\n    import sampling.nothing\n"
        "if __name__ == '__main__':\n    from pretrained.load import describe\n"
    )
    assert imports_of("model", file, modules()) == {
        Import("model", "kernels", True),
        Import("model", "data.loader", True),
        Import("model", "pretrained.load", False),
        Import("model", "sampling.nothing", False),
    }


def test_a_copied_recipe_runs(tmp_path):
    """train_scratch.py with model, config, kernels, passes, noises, diffusion, common, data and
    training, and nothing else; and a second run goes on from the first."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("train_scratch", "model", "config", "kernels", "passes", "noises", "diffusion",
                 "common"):
        shutil.copy(ROOT / f"{name}.py", copy)
    for name in ("data", "training"):
        ignored = shutil.ignore_patterns("__pycache__", "prepared")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    (copy / "text.txt").write_text("The cat sat on the mat and the dog ran to the door.\n" * 400)
    small = [
        "--n_layers=1",
        "--n_heads=2",
        "--dim=32",
        "--seq_len=32",
        "--batch_size=4",
        "--vocab_size=300",
        "--device=cpu",
        "--dtype=float32",
        "--compile=False",
        "--threads=1",
        "--eval_interval=1",
        "--eval_tokens=64",
        "--final_eval_tokens=128",
        "--sample_tokens=8",
        "--dataset=text.txt",
    ]
    for steps, resume in (2, False), (3, True):
        result = run(copy / "train_scratch.py", f"--max_steps={steps}", f"--resume={resume}",
                     *small, folder=copy, before=forget_the_repository)
        assert result.status == 0, result.err
        assert len(re.findall("^val nelbo .*", result.out, re.MULTILINE)) == 1
        assert result.out.splitlines()[-1].startswith("val nelbo ")
    written = {file.name for file in (copy / "out" / "scratch").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "train_state.pt"} <= written


def test_ruff_has_nothing_to_say():
    """Unused names, imports out of order, and no line over 100 columns: see pyproject.toml."""
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "No module named ruff" in result.stderr:
        pytest.skip("ruff is not installed: pip install -r tests/requirements.txt")
    assert result.returncode == 0, result.stdout[-3000:]
