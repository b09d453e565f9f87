"""The repository against a second opinion: what naive.py, which shares no code with it, makes of
the tiny checkpoints in records/. And naive.py against the references, where their outputs are at
hand.
"""
import json
import math
import warnings

import pytest
import torch
from conftest import ROOT
from naive import SAMPLERS, Model, block_loss, llada2_generate, mdlm_loss
from records.make import CHECKPOINT_NAMES, answer_questions, sample
from safetensors.torch import load_file

import diffusion
from diffusion import denoise
from model import Transformer
from sampling.engine import generate, infill

FOLDER = ROOT / "tests" / "records"
RECORDS = json.loads((FOLDER / "records.json").read_text())
TENSORS = load_file(FOLDER / "records.safetensors")
RULES = {"entropy": "entropy", "maskgit_plus": "low_confidence", "topk_margin": "margin"}


def name_of(record):
    return "-".join([record["sampler"], *map(str, record["arguments"].values())])


every_record = pytest.mark.parametrize("record", RECORDS, ids=name_of)


def load_model(record):
    """Our model of a record's checkpoint; Qwen3's is opened, for block diffusion."""
    model = Transformer.from_pretrained(FOLDER / record["checkpoint"], causal=False)
    if record["sampler"] == "block":
        model.config.block_length = record["arguments"]["block_length"]
    if record["sampler"] == "llada2":
        model.config.set_ends([])                       # naive.py writes on after an end of text
    return model


def llada2_arguments(reference):
    """The arguments of a reference record of LLaDA2 or LLaDA2.1 as `generate` and naive.py have
    them: the steps of all blocks together."""
    block_length = reference.get("block_size") or reference["block_length"]
    new = reference.get("max_new_tokens") or reference["gen_length"]
    P = len(reference["prompts"][0])
    blocks = math.ceil((P + new) / block_length) - P // block_length
    arguments = dict(max_new_tokens=new, block_length=block_length, steps=1,
                     threshold=reference["threshold"])
    if "editing_threshold" in reference:
        return dict(arguments, minimum=reference["num_to_transfer"],
                    edit_threshold=reference["editing_threshold"],
                    edit_passes=reference["max_post_steps"])
    steps = reference.get("steps_per_block") or reference["steps"]
    return dict(arguments, steps=blocks * min(steps, new // reference["minimal_topk"]))


def assert_close(ours, recorded, tolerance):
    """Equal but for `tolerance` times the largest recorded number."""
    difference = (ours - recorded).abs().max()
    assert difference <= tolerance * recorded.abs().max(), float(difference)


# ---- checkpoints and losses ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_published_checkpoints_give_the_recorded_logits(name):
    tokens = TENSORS[f"{name}.tokens"]
    opened = Transformer.from_pretrained(FOLDER / name, causal=False)
    assert_close(opened(tokens), TENSORS[f"{name}.logits"], 2e-5)
    if name == "qwen3":
        causal = Transformer.from_pretrained(FOLDER / name)
        assert_close(causal(tokens), TENSORS["qwen3.logits_causal"], 2e-5)
    elif name == "llada2":
        block_of = torch.arange(12) // 4
        blocks = block_of[:, None] >= block_of[None, :]
        assert_close(opened(tokens, blocks[None]), TENSORS["llada2.logits_blocks"], 2e-5)
    else:
        mask = TENSORS["attention_mask"]
        padded = opened(tokens, attention_mask=mask)
        assert_close(padded[mask], TENSORS[f"{name}.logits_padded"][mask], 2e-5)


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_published_checkpoints_go_out_as_they_came(name, tmp_path):
    Transformer.from_pretrained(FOLDER / name).export_pretrained(tmp_path)
    stored = load_file(FOLDER / name / "model.safetensors")
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == stored.keys()
    for tensor in stored:
        assert torch.equal(exported[tensor], stored[tensor]), tensor
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads((FOLDER / name / "config.json").read_text())


@pytest.mark.parametrize("name", ["mdlm", "bd3lm4", "bd3lm8", "bd3lm16"])
def test_losses_equal_the_records(name):
    tokens, t, mask = (TENSORS[f"{name}.{part}"] for part in ("tokens", "t", "mask"))
    if name == "mdlm":
        model = Transformer.from_pretrained(FOLDER / "llada")
        loss = diffusion.mdlm_loss(model, tokens, t, mask)
    else:
        model = Transformer.from_pretrained(FOLDER / "qwen3", causal=False)
        loss = diffusion.block_loss(model, tokens, int(name.removeprefix("bd3lm")), t, mask)
    assert_close(loss.loss.detach(), TENSORS[f"{name}.loss"], 1e-5)
    assert_close(loss.token_nll, TENSORS[f"{name}.token_nll"], 1e-5)


# ---- samplers ------------------------------------------------------------------------------------


@every_record
def test_generate_and_infill_equal_the_records(record):
    """All prompts of a record in one batch; the passes are counted where there is one prompt."""
    model, prompts, passes = load_model(record), record["prompts"], [0]
    arguments = dict(record["arguments"], on_step=lambda step: passes.append(step.number))
    if record["sampler"] == "infill":
        outputs = infill(model, prompts, **arguments)
    elif record["sampler"] == "dream":
        arguments["remasking"] = RULES[arguments.pop("alg")]
        arguments["block_length"] = arguments["max_new_tokens"]
        outputs = generate(model, prompts, **arguments)
    elif record["sampler"] == "llada2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # some edit to the limit
            outputs = generate(model, prompts, **arguments)
            del arguments["on_step"]
            assert generate(model, prompts, cache="block", **arguments) == outputs
        # The reference's canvas goes on to the end of its last block.
        new = arguments["max_new_tokens"]
        record = dict(record, outputs=cut(record["outputs"], record["prompts"], new))
    else:
        outputs = generate(model, prompts, arguments.pop("gen_length"), **arguments)
    assert outputs == record["outputs"]
    if len(prompts) == 1:
        assert passes[-1] == record["forward_passes"][0]
    if record["sampler"] == "block":                    # there the cache is exact
        assert generate(model, prompts, cache="block", max_new_tokens=16, steps=8) == outputs


def cut(outputs, prompts, new):
    return [output[:len(prompt) + new] for output, prompt in zip(outputs, prompts)]


def is_plain(record):
    """Whether `denoise` has all that the record asks for."""
    more = ("cfg_scale", "cache", "factor", "minimum")
    return not any(record["arguments"].get(name) for name in more)


@pytest.mark.parametrize("record", list(filter(is_plain, RECORDS)), ids=name_of)
def test_denoise_equals_the_records(record):
    model, arguments = load_model(record), record["arguments"]
    how = {"threshold": arguments.get("threshold"), "block_length": arguments.get("block_length")}
    for name in ("edit_threshold", "edit_passes"):
        if name in arguments:
            how[name] = arguments[name]
    if "alg" in arguments:
        how["remasking"] = RULES[arguments["alg"]]
    new = arguments.get("gen_length") or arguments.get("max_new_tokens") or 0
    for prompt, output in zip(record["prompts"], record["outputs"]):
        if record["sampler"] == "llada2":               # to the end of the last block
            new = len(output) - len(prompt)
        tokens = torch.tensor([prompt + [model.config.mask_token_id] * new])
        how["prompt_len"] = len(prompt) if new else 0
        assert denoise(model, tokens, arguments["steps"], **how)[0].tolist() == output


def test_the_records_tell_the_rules_apart():
    """A cache, a threshold or a rule that changed no answer would not be tested."""
    answers = {}
    for record in RECORDS:
        question = record["sampler"] + str(record["prompts"])
        answers.setdefault(question, []).append(str(record["outputs"]))
    for question, outputs in answers.items():
        assert len(set(outputs)) > 0.8 * len(outputs), question


# ---- the second opinion itself -------------------------------------------------------------------


def test_the_second_opinion_still_gives_the_recorded_tensors():
    models = {name: Model(FOLDER / name) for name in CHECKPOINT_NAMES}
    for name, answer in answer_questions(models, TENSORS).items():
        assert_close(answer, TENSORS[name], 1e-6)


@every_record
def test_the_second_opinion_still_gives_the_recorded_outputs(record):
    answer = sample(Model(FOLDER / record["checkpoint"]), record)
    assert answer == (record["outputs"], record["forward_passes"])


@pytest.mark.parametrize("name", [*CHECKPOINT_NAMES, "llada21"])
def test_the_second_opinion_gives_the_references_logits(fixture_path, name):
    model = Model(fixture_path(name))
    stored = load_file(fixture_path(name) / "io.safetensors")
    visible = torch.ones(32, 32, dtype=torch.bool)
    for number, tokens in enumerate(stored["input_ids"].tolist()):
        if name == "qwen3":
            assert_close(model.logits(tokens), stored["logits_bidirectional"][number], 2e-5)
            visible = visible.tril()
        assert_close(model.logits(tokens, visible), stored["logits"][number], 2e-5)
        if "block_mask" in stored:
            blocks = model.logits(tokens, stored["block_mask"])
            assert_close(blocks, stored["logits_block"][number], 2e-5)


REFERENCE_ARGUMENTS = {
    "llada": ("gen_length", "steps", "block_length", "cfg_scale"),
    "fast_dllm": ("gen_length", "steps", "block_length", "threshold", "cache"),
    "dream": ("max_new_tokens", "steps", "alg", "eps"),
}


@pytest.mark.parametrize("file, count", [("llada", 9), ("fast_dllm", 21), ("dream", 12)])
def test_the_second_opinion_gives_the_references_outputs(fixture_path, file, count):
    folder = fixture_path("samplers")
    references = json.loads((folder / f"{file}.json").read_text())
    assert len(references) == count
    for reference in references:
        model = Model(folder.parent / reference["checkpoint"])
        arguments = {name: reference[name] for name in REFERENCE_ARGUMENTS[file]}
        for row, prompt in enumerate(reference["prompts"]):
            padding = 0     # RoPE knows differences of positions alone: padding in front is nothing
            if "attention_mask" in reference:
                padding = reference["attention_mask"][row].count(0)
            output, passes = SAMPLERS[file](model, prompt[padding:], **arguments)
            assert output == reference["outputs"][row][padding:]
            counted = reference.get("forward_passes", passes)
            if reference.get("cache") and reference["threshold"] is not None:
                # The cached loops ask once more where a block's first pass has filled it already.
                blocks = reference["gen_length"] // reference["block_length"]
                assert passes <= counted <= passes + blocks
            else:
                assert counted == passes


@pytest.mark.parametrize("file, count", [("llada2", 7), ("llada21", 7)])
def test_the_second_opinion_gives_the_outputs_of_llada2(fixture_path, file, count):
    """Every other of those records that write on after an end of text, as naive.py does;
    test_mixture.py asks our own sampler for all of them."""
    folder = fixture_path("samplers")
    references = json.loads((folder / f"{file}.json").read_text())
    references = [r for r in references if "Sampler" in r["reference"] and not r["eos_early_stop"]]
    references = references[::2]
    assert len(references) == count
    model = Model(folder.parent / file)
    for reference in references:
        for prompt, output in zip(reference["prompts"], reference["outputs"]):
            answer, passes = llada2_generate(model, prompt, **llada2_arguments(reference))
            assert answer == output
            assert len(reference["prompts"]) > 1 or passes == reference["forward_passes"]


def test_the_second_opinion_gives_the_references_losses(fixture_path):
    llada, qwen = Model(fixture_path("llada")), Model(fixture_path("qwen3"))
    qwen.mask_id = 498
    stored = load_file(fixture_path("llada").parent / "losses.safetensors")
    for name in ("mdlm", "bd3lm4", "bd3lm8", "bd3lm16"):
        tokens, t, mask = (stored[f"{name}.{part}"] for part in ("tokens", "t", "mask"))
        if name == "mdlm":
            loss, token_nll = mdlm_loss(llada, tokens, t, mask)
        else:
            block_length = int(name.removeprefix("bd3lm"))
            t = t[:, None].expand(-1, 32 // block_length)           # one time for all blocks
            loss, token_nll = block_loss(qwen, tokens, block_length, t, mask)
        assert_close(loss, stored[f"{name}.loss"], 1e-5)
        assert_close(token_nll, stored[f"{name}.token_nll"], 1e-5)
