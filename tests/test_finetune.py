"""finetune_llada.py as a user runs it, adapters against PEFT, sharding on two processes, the memory
plan against what is measured."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import SignalAt, learned, refused, rows, succeed
from safetensors.torch import load_file
from scripts import in_fork, run, run_here, run_parallel
from tiny import tiny_checkpoint, tiny_model

import pretrained.load
from data.tokenizer import Tokenizer
from diffusion import cart_weights, sft_loss
from experiments.bench_training import peaks_of_steps
from kernels import LinearCrossEntropy
from model import Config, Transformer
from pretrained.config import read_config
from pretrained.hub import adapter_base
from pretrained.tiny import tiny_model as tiny_of_family
from sampling.engine import generate
from sampling.sampler import Sampler
from training.finetuning import base_of_run
from training.lora import (
    LoRALinear,
    add_lora,
    holds_a_run,
    init_lora,
    load_adapter,
    merge_lora,
    name_of_base,
    save_adapter,
)
from training.memory import SHAPES, plan_memory
from training.merge import write_merged

SCRIPT = "finetune_llada.py"
STEPS = 10


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of 60 short conversations."""
    rng, words = random.Random(0), "cat dog sun rain house door green".split()
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {"prompt": f"{word} {number}?", "response": " ".join([word] * rng.randint(1, 4))}
        for number in range(60)
        for word in [rng.choice(words)]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_base(folder, family, **size):
    """A small random model in its family's published layout, with a tokenizer of bytes that has
    tokens for a chat."""
    text = Tokenizer.bytes()
    text.add_chat_tokens()
    tiny_of_family(
        family, text, 64, **{"dim": 32, "n_layers": 2, "n_heads": 2, **size}
    ).export_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("llada"), "llada")


@pytest.fixture(scope="module")
def tiny(base, chats):
    """tiny(out_dir, settings...): the command line of a run that takes a second; later settings
    overrule earlier ones."""

    def arguments(out_dir, *settings):
        return (
            "--threads=1",
            "--dtype=float32",
            f"--init_from={base}",
            f"--dataset={chats}",
            "--seq_len=64",
            "--batch_size=4",
            f"--max_steps={STEPS}",
            "--eval_interval=0",
            "--eval_sequences=2",
            "--final_eval_sequences=4",
            "--sample_tokens=0",
            "--lora_rank=4",
            "--lora_alpha=8",
            "--learning_rate=0.005",
            f"--out_dir={out_dir}",
            *settings,
        )

    return arguments


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """unbroken(settings...): the folder of a run of one process that nobody disturbed, made
    once."""
    made = {}

    def folder(*settings):
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("unbroken")
            succeed(run(SCRIPT, *tiny(made[settings], *settings)))
        return made[settings]

    return folder


def losses(folder):
    """Of every step since the last evaluation."""
    return json.loads((Path(folder) / "train_state" / "record.json").read_text())["losses"]


def difference(a, b):
    """The largest difference of two dicts of tensors."""
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


# ---------------------------------------------------------------- whole runs


def test_tiny_llada_from_nothing_to_a_merged_model(chats, tmp_path):
    """README's first command, shorter; then sample.py with the adapter, as a folder of its own, and
    merged: the same answer."""
    out, merged = tmp_path / "out", tmp_path / "merged"
    result = succeed(
        run(
            SCRIPT,
            "--init_from=tiny",
            f"--dataset={chats}",
            "--vocab_size=300",
            "--dtype=float32",
            "--threads=1",
            f"--out_dir={out}",
            "--max_steps=15",
            "--eval_interval=5",
            "--batch_size=8",
            "--seq_len=48",
            "--eval_sequences=16",
            "--final_eval_sequences=16",
            "--sample_tokens=8",
            "--lora_rank=8",
            "--lora_targets=q,v,up,down",
        )
    )
    assert re.fullmatch(
        r"val nelbo \d+\.\d{4} \+- \d+\.\d{4} nats/token, \d+\.\d{3} bits/byte",
        result.out.splitlines()[-1],
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (
        [row["step"] for row in log] == [5, 10, 15]
        and log[-1]["val_nelbo"] < log[0]["val_nelbo"]
        and len(re.findall("step .*->", result.out)) == 3
    )
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "train_state",
        "base",
    } <= {file.name for file in out.iterdir()}

    before = learned(out)
    assert (
        "wrote" in succeed(run(SCRIPT, f"--out_dir={out}", f"--merge={merged}")).out
        and difference(before, learned(out)) == 0
    )
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LLaDAModelLM"]
    answer = succeed(
        run(
            "sample.py",
            "--prompt=cat",
            "--max_new_tokens=8",
            "--temperature=0",
            f"--checkpoint={out / 'base'}",
            f"--adapter={out}",
        )
    ).out
    for sampler in (Sampler.load(out), Sampler.load(merged)):
        prompt = sampler.encode_prompt("cat")
        tokens = generate(sampler.model, [prompt], 8, 8, 8)[0]
        used = sampler.decode(tokens[len(prompt) :])[1]
        assert answer.startswith(
            sampler.tokenizer.decode(tokens[: len(prompt) + used], skip_special_tokens=True)
        )
    tokens = torch.arange(40)[None]
    adapted = load_adapter(Transformer.from_pretrained(out / "base"), out).eval()
    plain = Transformer.from_pretrained(out / "base")(tokens)
    with torch.no_grad():
        assert (
            (adapted(tokens) - Transformer.from_pretrained(merged)(tokens)).abs().max()
            < 1e-5
            < 1e-3
            < (adapted(tokens) - plain).abs().max()
        )


def test_tiny_dream_in_full(chats, tmp_path):
    """Everything learns, with Dream's shift and weights, in bfloat16; text instead of conversations
    continues the pretraining."""
    out = tmp_path / "out"
    small = (
        "--vocab_size=300",
        "--threads=1",
        f"--out_dir={out}",
        "--batch_size=2",
        "--seq_len=48",
        "--sample_tokens=0",
        "--eval_interval=0",
        "--final_eval_sequences=4",
    )
    succeed(
        run(
            SCRIPT,
            "--init_from=tiny:Dream",
            f"--dataset={chats}",
            "--lora_rank=0",
            "--cart=0.2",
            "--dtype=bfloat16",
            "--max_steps=12",
            "--learning_rate=1e-2",
            f"--merge={tmp_path / 'merged'}",
            *small,
        )
    )
    assert sum(losses(out)[-4:]) < sum(losses(out)[:4])
    model = Transformer.from_pretrained(out)
    assert (
        model.config.family == "Dream"
        and model.config.shift
        and model.embed.weight.dtype == torch.float32
    )
    assert (
        difference(
            Transformer.from_pretrained(tmp_path / "merged").state_dict(), model.state_dict()
        )
        == 0
    )
    succeed(run(SCRIPT, f"--out_dir={out}", f"--merge={tmp_path / 'again'}"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    succeed(
        run(
            SCRIPT,
            f"--init_from={out}",
            f"--dataset={text}",
            "--lora_rank=2",
            "--max_steps=2",
            "--dtype=float32",
            *small,
            f"--out_dir={tmp_path / 'text'}",
        )
    )


def test_one_of_our_own_models(tiny, tmp_path):
    """It lacks the tokens of a chat: they are added, and the base that has them stands beside the
    adapter."""
    tiny_checkpoint(tmp_path / "scratch", vocab_size=258)
    succeed(
        run(SCRIPT, *tiny(tmp_path / "out", f"--init_from={tmp_path / 'scratch'}", "--max_steps=2"))
    )
    succeed(run(SCRIPT, f"--out_dir={tmp_path / 'out'}", f"--merge={tmp_path / 'merged'}"))
    shutil.move(
        tmp_path / "out", tmp_path / "moved"
    )  # the adapter names its base by where it lies beside it
    for folder in (tmp_path / "moved", tmp_path / "merged"):
        sampler = Sampler.load(folder)
        assert (
            sampler.config.vocab_size == 260
            and not sampler.config.causal
            and len(sampler.end_of_turn) == 1
            and sampler.mask_id == 257
        )


# ---------------------------------------------------------------- many processes, kills


@pytest.mark.parametrize("settings", [(), ("--lora_rank=0",)], ids=["lora", "everything"])
def test_nobody_reads_the_whole_model(tiny, base, tmp_path, settings):
    """Each of two processes reads its half of every tensor."""
    read = tmp_path / "read"
    arguments = tiny(tmp_path / "run", *settings, "--max_steps=1", "--batch_size=2")
    succeed(*run_parallel(2, SCRIPT, *arguments, before=WatchReading(read)))
    total = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    numbers = [int(Path(f"{read}{rank}").read_text()) for rank in range(2)]
    assert numbers == pytest.approx([total / 2] * 2, rel=0.01)


class WatchReading:
    """Writes how many numbers a process read from checkpoints to a file."""

    def __init__(self, path):
        self.path = path

    def __call__(self):
        original, count = pretrained.load.read_rows, [0]

        def watched(*arguments):
            for which, part in original(*arguments):
                count[0] += part.numel()
                Path(f"{self.path}{os.environ['RANK']}").write_text(str(count[0]))
                yield which, part

        pretrained.load.read_rows = watched


def test_killed_and_resumed_by_one_process_or_two(tiny, unbroken, tmp_path):
    settings = tiny(tmp_path / "one", "--eval_interval=5")
    killed = run(SCRIPT, *settings, before=SignalAt(8, signal.SIGKILL))
    assert killed.status == -signal.SIGKILL and rows(tmp_path / "one")[-1]["step"] == 5
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    often = unbroken("--eval_interval=5")
    succeed(run(SCRIPT, *tiny(tmp_path / "one", "--eval_interval=5", "--resume")))
    assert (
        losses(tmp_path / "one") == losses(often)
        and difference(learned(tmp_path / "one"), learned(often)) == 0
    )
    assert rows(tmp_path / "one") == rows(often)
    succeed(
        *run_parallel(
            2, SCRIPT, *tiny(tmp_path / "two", "--eval_interval=5", "--batch_size=2", "--resume")
        )
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(often), abs=1e-4)


def test_one_process_dies(tiny, unbroken, tmp_path):
    """The other says so and ends; what they had saved goes on with one process."""
    settings = tiny(tmp_path, "--eval_interval=5", "--batch_size=2", "--lora_rank=0")
    kill = SignalAt(8, signal.SIGKILL, rank=1)
    survivor, killed = run_parallel(2, SCRIPT, *settings, before=kill)
    assert killed.status == -signal.SIGKILL and survivor.status == 1, survivor
    assert rows(tmp_path)[-1]["step"] == 5
    assert (
        survivor.err.splitlines()[-1].startswith(
            "error: process 0 lost another process of this run"
        )
        and "Traceback" not in survivor.err
    )
    succeed(run(SCRIPT, *tiny(tmp_path, "--eval_interval=5", "--lora_rank=0", "--resume")))
    assert losses(tmp_path) == pytest.approx(
        losses(unbroken("--lora_rank=0", "--eval_interval=5")), abs=1e-4
    )


class OtherData:
    """Gives the second process another file of conversations."""

    def __init__(self, path):
        self.path = path

    def __call__(self):
        if os.environ["RANK"] == "1":
            sys.argv.append(f"--dataset={self.path}")


def test_processes_that_disagree_on_the_data(tiny, chats, tmp_path):
    other = tmp_path / "chats.jsonl"
    other.write_text(chats.read_text().replace("cat", "dog"))
    results = run_parallel(2, SCRIPT, *tiny(tmp_path / "run"), before=OtherData(other))
    told = "".join(result.err for result in results)
    assert [result.status for result in results] == [2, 2] and told.count(
        "error: the processes disagree on"
    ) == 1, results


def test_a_damaged_state(tiny, unbroken, tmp_path):
    """A byte of a shard changed, a shard cut short: one line, by one of two processes, and nothing
    is trained."""

    def damaged(name, damage):
        shutil.copytree(unbroken(), tmp_path / name)
        shard = next((tmp_path / name / "train_state").glob("*.safetensors"))
        shard.write_bytes(damage(shard.read_bytes()))
        return tiny(tmp_path / name, "--resume", "--max_steps=30", "--batch_size=2")

    results = run_parallel(
        2, SCRIPT, *damaged("byte", lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    )
    assert [result.status for result in results] == [2, 2] and "".join(
        result.err for result in results
    ).count("is damaged or missing: delete") == 1, results
    refused(
        run_here(SCRIPT, *damaged("cut", lambda data: data[: len(data) // 2]), "--batch_size=4"),
        "train_state",
        "is damaged",
    )
    next((tmp_path / "cut" / "train_state").glob("*.safetensors")).unlink()
    refused(run_here(SCRIPT, *tiny(tmp_path / "cut", "--resume")), "missing")
    (tmp_path / "cut" / "train_state" / "record.json").write_text("{")
    refused(run_here(SCRIPT, *tiny(tmp_path / "cut", "--resume")), "record.json", "damaged")


# ---------------------------------------------------------------- mistakes


def test_mistakes(tiny, base, unbroken, tmp_path):
    adapter = unbroken()
    results = run_parallel(2, SCRIPT, *tiny(tmp_path, "--lora_rank=33", "--batch_size=2"))
    assert [result.status for result in results] == [2, 2] and [
        result.err.count("lora_rank 33 does not fit") for result in results
    ].count(1) == 1, results
    refused(run_here(SCRIPT, *tiny(adapter, f"--merge={base}")), "merge", "overwritten")
    refused(run_here(SCRIPT, *tiny(adapter, f"--merge={adapter}")), "merge", "overwritten")
    refused(run_here(SCRIPT, *tiny(base, "--lora_rank=0")), "out_dir", "overwritten")
    refused(run_here(SCRIPT, *tiny(adapter, "--lora_rank=0")), "an adapter of another run")
    refused(run_here(SCRIPT, *tiny(tmp_path, f"--init_from={adapter}")), "is an adapter", "--merge")
    refused(
        run_here(SCRIPT, *tiny(adapter, "--resume", "--lora_rank=2")),
        "cannot resume",
        "lora_rank was 4",
    )
    other = make_base(tmp_path / "other", "llada", dim=64)
    refused(
        run_here("sample.py", f"--checkpoint={other}", f"--adapter={adapter}", "--prompt=x"),
        "belongs to another model",
    )
    for checkpoint, words in (
        (make_base(tmp_path / "dream", "Dream"), "belongs to another"),
        (make_base(tmp_path / "short", "llada", n_layers=1), "another"),
    ):
        with pytest.raises(ValueError, match=words):
            Sampler.load(checkpoint, adapter=adapter)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        Sampler.load(base, adapter=other)
    with pytest.raises(ValueError, match="it would be added twice; leave --adapter away"):
        Sampler.load(adapter, adapter=adapter)
    for arguments, words in (
        (dict(rank=-1), "lora_rank -1"),
        (dict(targets="q,w"), "'w'"),
        (dict(dropout=1.0), "dropout"),
        (dict(alpha=0), "alpha"),
        (dict(alpha=math.nan), "alpha"),
    ):
        with pytest.raises(ValueError, match=words):
            add_lora(tiny_model(), **{"rank": 4, "alpha": 4, **arguments})
    with pytest.raises(ValueError, match="lora_targets gate name no matrix of a bert model"):
        add_lora(tiny_of_family("bert", Tokenizer.bytes(), 16), 2, 2, targets="gate")
    with pytest.raises(ValueError, match="cannot be stored: .* is stored transposed"):
        save_adapter(
            add_lora(tiny_of_family("gpt2", Tokenizer.bytes(), 16), 2, 2), tmp_path, "gpt2"
        )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for change, words in (
        (dict(use_dora=True), "use_dora"),
        (dict(peft_type="IA3"), "IA3"),
        (dict(r=5), "shape"),
        (dict(r="4"), "whole number"),
    ):
        (
            shutil.copytree(adapter, tmp_path / "changed", dirs_exist_ok=True)
            / "adapter_config.json"
        ).write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=words):
            load_adapter(Transformer.from_pretrained(base), tmp_path / "changed")


# ---------------------------------------------------------------- adapters


def randomize(model, seed=0):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_rank_0_trains_nothing_and_a_new_adapter_changes_nothing():
    tokens, model = torch.arange(20)[None], tiny_model()
    expected = model(tokens)
    init_lora(add_lora(model, 4, 8))
    assert torch.equal(model(tokens), expected) and {
        name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad
    } == {"lora_A", "lora_B"}
    assert all(layer.lora_A.std() > 0 for layer in model.modules() if isinstance(layer, LoRALinear))
    none = add_lora(tiny_model(), 0, 8)
    assert (
        torch.equal(none(tokens), expected)
        and sum(p.numel() for p in none.parameters() if p.requires_grad) == 0
    )


def test_merging_and_the_formula():
    """y = x W^T + alpha / rank (x A^T) B^T, beside and in the weights; dropout only in training."""
    model = randomize(add_lora(tiny_model(), 4, 8, dropout=0.5, targets="q,down"))
    layer, x = model.blocks[0].attn.q, torch.randn(3, 32)
    assert torch.allclose(
        layer(x), x @ layer.weight.T + 8 / 4 * x @ layer.lora_A.T @ layer.lora_B.T, atol=1e-5
    )
    assert not torch.equal(layer.train()(x), layer(x))
    tokens = torch.arange(20)[None]
    expected = model.eval()(tokens)
    merged = merge_lora(model)
    assert (
        not any(isinstance(module, LoRALinear) for module in merged.modules())
        and (merged(tokens) - expected).abs().max() < 1e-5
    )


def test_an_adapter_is_never_lost_in_silence(tmp_path):
    """The published layout would have the matrices without it; a second one would take the places
    of the first, with its alpha."""
    base = tiny_of_family("llama", Tokenizer.bytes(), 64, dim=32, n_layers=1, n_heads=2)
    base.export_pretrained(tmp_path / "base")
    adapted = randomize(add_lora(base, 2, 4, targets="q"))
    save_adapter(adapted, tmp_path / "adapter", tmp_path / "base")
    for write in (adapted.save_pretrained, adapted.export_pretrained):
        with pytest.raises(ValueError, match="has an adapter, which would be left out"):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has an adapter already: merge that into it"):
        load_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has an adapter already: merge that into it"):
        add_lora(adapted, 2, 4)
    tokens = torch.arange(9)[None]
    twice = load_adapter(merge_lora(adapted), tmp_path / "adapter")
    once = load_adapter(Transformer.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert not torch.allclose(twice(tokens), once(tokens), atol=1e-3)


def test_peft_loads_our_adapter_and_we_load_peft_s(tmp_path):
    import peft
    import transformers

    ours = tiny_of_family("llama", Tokenizer.bytes(), 64, dim=32, n_layers=2, n_heads=2)
    ours.export_pretrained(tmp_path / "base")
    tokens = torch.arange(30)[None]
    randomize(add_lora(ours, 4, 6)).eval()
    save_adapter(ours, tmp_path / "ours", tmp_path / "base")
    twin = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    plain = twin(tokens).logits
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "ours").eval()
    assert (
        (theirs(tokens).logits - ours(tokens)).abs().max()
        < 1e-5
        < 1e-2
        < (plain - ours(tokens)).abs().max()
    )

    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    theirs = randomize(
        peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), settings
        ),
        1,
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(Transformer.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    assert (theirs(tokens).logits - loaded(tokens)).abs().max() < 1e-5
    assert (
        theirs(tokens).logits - Transformer.from_pretrained(tmp_path / "theirs")(tokens)
    ).abs().max() < 1e-5  # the config names the base


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("llama"), "llama")


def peft_adapter(base, folder, kind="LlamaForCausalLM", learned=True, **settings):
    """(PEFT's model with an adapter on `base`, the folder it is saved in)."""
    import peft
    import transformers

    theirs = getattr(transformers, kind).from_pretrained(base)
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings}
        ),
    )
    theirs = (randomize(theirs) if learned else theirs).eval()
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_initialisations_that_leave_the_base_alone(llama, tmp_path, init):
    theirs, folder = peft_adapter(llama, tmp_path, init_lora_weights=init)
    ours, tokens = load_adapter(Transformer.from_pretrained(llama), folder), torch.arange(30)[None]
    assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base(llama, tmp_path, init):
    """Their tensors belong to weights stored nowhere, until PEFT makes them a plain LoRA."""
    theirs, folder = peft_adapter(llama, tmp_path / "start", init_lora_weights=init, learned=False)
    randomize(theirs).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=f"init_lora_weights = '{init}' is not supported: it changes the base"
    ):
        load_adapter(Transformer.from_pretrained(llama), tmp_path / "adapter")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=folder)
    ours, tokens = (
        load_adapter(Transformer.from_pretrained(llama), tmp_path / "plain"),
        torch.arange(30)[None],
    )
    assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4


def change_settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        dict(init_lora_weights="corda"),
        dict(init_lora_weights="loftq"),
        dict(init_lora_weights="lora_ga"),
        dict(init_lora_weights="PiSSA"),
        dict(init_lora_weights="of the future"),
        dict(init_lora_weights=["pissa"]),
        dict(alora_invocation_tokens=[1, 2]),
        dict(use_dora=True),
        dict(use_rslora=True),
        dict(use_qalora=True),
        dict(rank_pattern={"q_proj": 2}),
        dict(alpha_pattern={"q_proj": 2}),
        dict(fan_in_fan_out=True),
        dict(lora_bias=True),
        dict(bias="all"),
        dict(layer_replication=[[0, 1]]),
        dict(target_parameters=["x.weight"]),
        dict(kasa_config={"beta": 1e-4}),
        dict(arrow_config={"top_k": 1}),
        dict(monteclora_config={"num_samples": 1}),
        dict(use_bdlora={"nblocks": 2}),
        dict(velora_config={"num_groups": 2}),
        dict(megatron_config={"x": 1}),
        dict(use_something_new=True),
        dict(scale_of_the_future=0.5),
        dict(mode="new"),
    ],
)
def test_what_is_not_plain_lora_is_refused(llama, tmp_path, changes):
    _, folder = peft_adapter(llama, tmp_path)
    change_settings(folder, **changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} = .* is not supported") as caught:
        load_adapter(Transformer.from_pretrained(llama), folder)
    assert "\n" not in str(caught.value)


def test_settings_of_a_plain_lora_that_change_nothing(llama, tmp_path):
    """Where it was put and how it was trained; and keys of a newer PEFT that are off."""
    theirs, folder = peft_adapter(llama, tmp_path, layers_to_transform=[1], lora_dropout=0.2)
    change_settings(
        folder,
        something_new=None,
        another=False,
        third={},
        fourth=[],
        corda_config={"corda_method": "ipm"},
        loftq_config={},
        exclude_modules=["lm_head"],
        task_type="CAUSAL_LM",
        auto_mapping={"base_model_class": "LlamaForCausalLM"},
        revision=None,
    )
    ours, tokens = load_adapter(Transformer.from_pretrained(llama), folder), torch.arange(30)[None]
    assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        dict(modules_to_save=["lm_head"]),
        dict(modules_to_save=["embed_tokens"]),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(trainable_token_indices=[3, 4]),
        "resized",
    ],
)
@pytest.mark.parametrize("is_told", [True, False])
def test_adapters_that_learned_embedding_or_head(llama, tmp_path, settings, is_told):
    """is_told: by adapter_config.json; otherwise by the tensors alone."""
    import peft
    import transformers

    base = transformers.LlamaForCausalLM.from_pretrained(llama)
    if settings == "resized":
        base.resize_token_embeddings(base.config.vocab_size + 8)
        settings = {}
    model = peft.get_peft_model(
        base, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    )
    model.save_pretrained(tmp_path)
    if not is_told:
        change_settings(tmp_path, modules_to_save=None, trainable_token_indices=None)
    with pytest.raises(
        ValueError, match="learned the embedding, the head or other whole modules"
    ) as caught:
        load_adapter(Transformer.from_pretrained(llama), tmp_path)
    assert "belongs to another" not in str(caught.value)


def test_an_adapter_of_a_body_without_head(llama, tmp_path):
    """Its names lack `model.`: task_type FEATURE_EXTRACTION, of an embedding model."""
    theirs, folder = peft_adapter(llama, tmp_path, "LlamaModel", task_type="FEATURE_EXTRACTION")
    ours, tokens = load_adapter(Transformer.from_pretrained(llama), folder), torch.arange(30)[None]
    logits = theirs(input_ids=tokens)[0] @ ours.head.weight.T
    assert (logits - ours(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_s_folder_stands_for_its_base(llama, chats, tmp_path, has_config):
    """Without a tokenizer it takes its base's, and a config.json beside it makes it no model."""
    theirs, folder = peft_adapter(llama, tmp_path / "adapter")
    for file in folder.glob("token*"):
        file.unlink()
    if has_config:
        shutil.copy(llama / "config.json", folder)
    base, tokens = Tokenizer.from_pretrained(llama), torch.arange(30)[None]
    sampler = Sampler.load(folder)
    assert (theirs(tokens).logits - sampler.model(tokens)).abs().max() < 1e-5
    assert sampler.tokenizer.vocab_size == base.vocab_size and sampler.tokenizer.encode(
        "a cat"
    ) == base.encode("a cat")
    write_merged(folder, tmp_path / "merged")
    merged = Sampler.load(tmp_path / "merged")
    assert (theirs(tokens).logits - merged.model(tokens)).abs().max() < 1e-5
    assert merged.tokenizer.encode("a cat") == base.encode("a cat")
    for script in ("convert_ar.py", "convert_bert.py", SCRIPT):
        refused(
            run_here(
                script,
                f"--init_from={folder}",
                f"--out_dir={tmp_path / 'out'}",
                f"--dataset={chats}",
            ),
            "is an adapter",
            "--merge",
        )
    result = run(
        "eval.py",
        f"--checkpoint={folder}",
        f"--dataset={chats}",
        "--device=cpu",
        "--threads=1",
        "--max_tokens=64",
        "--seq_len=64",
    )
    assert result.status == 0 and "nats" in result.out, result


def test_an_adapter_s_base(llama, tmp_path):
    _, folder = peft_adapter(llama, tmp_path / "adapter")
    change_settings(folder, base_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="names its own folder as its base"):
        Sampler.load(folder)
    change_settings(folder, base_model_name_or_path="someone/model", revision="v2")
    with pytest.raises(ValueError, match="belongs to revision 'v2' of someone/model"):
        Sampler.load(folder)
    shutil.copy(llama / "config.json", folder)  # with weights it is a model
    shutil.copy(llama / "model.safetensors", folder)
    assert adapter_base(folder) is None


def test_how_an_adapter_names_its_base(base, tmp_path):
    assert name_of_base("tiny", tmp_path / "base", tmp_path) == "base"
    assert name_of_base(os.path.relpath(base), base, tmp_path) == str(base.resolve())
    assert name_of_base("someone/model", tmp_path / "in the cache", tmp_path) == "someone/model"
    assert holds_a_run(base) and not holds_a_run(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    assert holds_a_run(tmp_path)


def test_an_adapter_names_a_gguf_file_by_its_path(tmp_path, monkeypatch):
    """From wherever sample.py is started later."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    named = name_of_base("model.gguf", Path("model.gguf"), tmp_path / "out")
    assert named == str(tmp_path.resolve() / "model.gguf")


def test_folders_in_the_home_of_who_trains(base, tmp_path, monkeypatch):
    """A model, its tokenizer, an adapter and what is merged of both: none goes into a folder that
    is called ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = Transformer.from_pretrained(base)
    model.export_pretrained("~/base")
    Tokenizer.from_pretrained(base).save_pretrained("~/base")
    model.save_pretrained("~/ours")
    init_lora(add_lora(model, 2, 2.0), 1)
    save_adapter(model, "~/adapter", str(tmp_path / "home" / "base"))
    write_merged("~/adapter", "~/merged")
    with pytest.raises(ValueError, match="they would be overwritten"):
        write_merged("~/adapter", "~/base")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    made = {path.name for path in (tmp_path / "home").iterdir()}
    assert made == {"base", "ours", "adapter", "merged"}


def test_a_llada_s_head_is_not_taken_for_a_matrix_of_its_blocks(base, tmp_path):
    """Both are called ff_out: PEFT must find our target_modules in the blocks alone."""
    import peft

    save_adapter(randomize(add_lora(Transformer.from_pretrained(base), 2, 2)), tmp_path, base)
    shell = torch.nn.Module()
    for name, tensor in load_file(base / "model.safetensors").items():  # a model with LLaDA's names
        *parents, leaf, _ = name.split(".")
        place = shell
        for parent in parents:
            place = place._modules.setdefault(parent, torch.nn.Module())
        if tensor.dim() == 2:
            place._modules[leaf] = torch.nn.Linear(*tensor.shape[::-1], bias=False)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(tmp_path), shell)
    found = {
        name
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    stored = {
        re.sub(r"base_model\.model\.(.*)\.lora_[AB]\.weight", r"\1", name)
        for name in learned(tmp_path)
    }
    assert found == stored and len(found) == 2 * 7 and "model.transformer.ff_out" not in found


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cart", [0.0, 0.3])
def test_sft_loss_is_llada_s_and_dream_s(shift, cart):
    """Against the published formulas, written with all logits and loops."""
    model, generator = tiny_model(shift=shift, qk_norm=False), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (3, 12), generator=generator)
    maskable = torch.arange(12) >= torch.tensor([[4], [7], [11]])
    p_mask = torch.tensor([0.9, 0.5, 1.0])
    noisy = torch.where(
        (torch.rand(3, 12, generator=generator) < p_mask[:, None]) & maskable, 257, tokens
    )
    masked = noisy == 257
    logits = model(noisy)
    logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1) if shift else logits
    nll = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")  # [3, 12]
    if cart:
        weights = torch.tensor(
            [
                [
                    sum(
                        0.5 * cart * (1 - cart) ** (abs(i - j) - 1)
                        for j in range(12)
                        if not masked[b, j] and j != i
                    )
                    for i in range(12)
                ]
                for b in range(3)
            ]
        )
        assert torch.allclose(cart_weights(masked, cart), weights * masked)
        expected = ((nll * weights * masked).sum(1) / masked.sum(1).clamp(min=1)).mean()
    else:
        expected = (
            (nll * masked / p_mask[:, None]).sum(1) / maskable.sum(1)
        ).sum() / 3  # LLaDA's GUIDELINES.md
    found = sft_loss(model, tokens, maskable, p_mask, masked, cart=cart)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.nelbo.item() == pytest.approx(
        ((nll * masked / p_mask[:, None]).sum() / maskable.sum()).item(), rel=1e-5
    )
    found.loss.backward()
    gradient = model.head.weight.grad.clone()
    model.head.weight.grad = None
    expected.backward()
    assert torch.allclose(gradient, model.head.weight.grad, atol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets, weights = (
        torch.randn(5, 8, requires_grad=True),
        torch.randn(30, 8, requires_grad=True),
        torch.arange(5),
        torch.rand(5),
    )
    total, _ = LinearCrossEntropy.apply(hidden, weight, None, targets, weights, 2)
    total.backward()
    expected, hidden.grad = hidden.grad, None
    total, _ = LinearCrossEntropy.apply(hidden, weight.detach(), None, targets, weights, 2)
    assert [grad is None for grad in total.grad_fn.grads] == [False, True, True]
    total.backward()
    assert torch.equal(hidden.grad, expected)


# ---------------------------------------------------------------- memory

CASES = [
    dict(rank=16, dtype="float32", checkpointing=True),
    dict(rank=0, dtype="float32", checkpointing=False),
]


def test_the_plan_is_what_a_step_takes():
    config = dict(vocab_size=8192, dim=256, n_layers=2, n_heads=4, qk_norm=False)
    cases = [dict(case, config=config, T=256, B=1, plain=False) for case in CASES]
    measured = in_fork(peaks_of_steps, 1, cases)
    planned = [
        plan_memory(
            Config(**config),
            256,
            1,
            case["rank"],
            dtype=getattr(torch, case["dtype"]),
            checkpoint_blocks=case["checkpointing"],
        ).peak
        for case in CASES
    ]
    assert planned == pytest.approx(measured, rel=0.15)


def test_plan_of_published_models(tmp_path):
    """From a config.json without weights: LLaDA-8B by LoRA in less than 24 GB; Dream's parameters
    are its published 7.6 billion."""
    llada = {
        "model_type": "llada",
        "embedding_size": 126464,
        "vocab_size": 126464,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "max_sequence_length": 4096,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "rope_theta": 500000.0,
    }
    dream = {
        "model_type": "Dream",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "mask_token_id": 151666,
    }
    for name, raw, count in (
        ("GSAI-ML/LLaDA-8B-Base", llada, 8015581184),
        ("Dream-org/Dream-v0-Base-7B", dream, 7615616512),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
        config, _ = read_config(tmp_path / name)
        with torch.device("meta"):
            assert sum(p.numel() for p in Transformer(config).parameters()) == count
        assert all(
            getattr(config, field) == value for field, value in SHAPES[name].items()
        )  # what is planned without a network

    # Every layer takes as much as any other: those of four and of two tell of all 32.
    two, four = (plan_of_llada(tmp_path, llada | {"n_layers": n}) for n in (2, 4))
    all_layers = {name: four[name] + 14 * (four[name] - two[name]) for name in four}
    learn = all_layers["of them learn"]
    assert all_layers["parameters"] - learn == 8015581184
    assert 16.0 < all_layers["weights"] < all_layers["peak"] < 22
    assert all_layers["weights"] == pytest.approx((2 * 8015581184 + 4 * learn) / 1e9, abs=0.01)


def plan_of_llada(folder, raw):
    """The figures that --plan prints for a config.json: numbers of parameters, and GB."""
    (folder / "config.json").write_text(json.dumps(raw))
    out = succeed(run_here(SCRIPT, "--plan", "--memory_gb=24", f"--init_from={folder}")).out
    assert "fits into 24 GB: yes" in out and "1 x 1024 tokens a process, 1 process" in out
    lines = re.findall(r"^  ([\w ]+?) +([\d.,]+)(?: |$)", out, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in lines}


def test_plan_of_several_processes(base):
    config = Config(vocab_size=2048, dim=256, n_layers=4, n_heads=4, qk_norm=False)
    alone, eight = (
        plan_memory(config, 64, 1, 0, dtype=torch.float32, ranks=ranks) for ranks in (1, 8)
    )
    assert alone.parameters == alone.trained == eight.parameters and alone.gathered == 0
    assert (
        alone.weights
        == alone.gradients
        == 4 * alone.parameters
        == 8 * eight.weights
        == 8 * eight.gradients
        == 4 * eight.optimizer
    )
    outer, block = (
        2 * 2048 * 256 + 256,
        sum(p.numel() for p in Transformer(config).blocks[0].parameters()),
    )
    assert eight.gathered == 4 * (outer + 2 * block) + 8 * outer
    assert eight.weights + eight.optimizer + eight.gathered < eight.peak < alone.peak / 2
    arguments = "--init_from=tiny", "--plan", "--ranks=2", "--memory_gb=0.5"
    text = succeed(run_here(SCRIPT, *arguments)).out
    assert "2 processes" in text and "gathered" in text and "fits into 0.5 GB: no" in text
    text = succeed(run_here(SCRIPT, f"--init_from={base}", "--plan", "--lora_rank=4")).out
    assert "1 x 64 tokens a process" in text                # its context


def test_new_tokens_of_a_base_can_be_told_apart(tmp_path):
    """An adapter leaves embedding and head alone: equal rows would stay equal for ever."""
    checkpoint, text = tiny_checkpoint(tmp_path / "base"), Tokenizer.bytes()
    new = text.add_special_tokens(["<|begin|>", "<|end|>"])
    base = base_of_run(checkpoint.as_posix(), tmp_path / "run", text, 32, 1, vocab_size=260)
    model = Transformer.from_pretrained(base)
    for weight in (model.embed.weight, model.head.weight):
        old, first, second = weight[:260], *weight[new]
        assert (first - second).norm() > old.std(0).norm() / 2
        assert first.norm() < 2 * old.norm(dim=1).max()
    again = base_of_run(checkpoint.as_posix(), tmp_path / "other", text, 32, 1, vocab_size=260)
    assert Transformer.from_pretrained(again).embed.weight.equal(model.embed.weight)


def test_a_new_run_does_not_take_an_adapters_base_away(tmp_path):
    """The base of a tiny model follows from the seed, and lies in the folder of its adapter."""
    text = Tokenizer.bytes()
    base = base_of_run("tiny", tmp_path, text, 32, seed=1)
    before = (base / "model.safetensors").read_bytes()
    base_of_run("tiny", tmp_path, text, 32, seed=2)         # nothing stands on it yet
    assert (base / "model.safetensors").read_bytes() != before
    base_of_run("tiny", tmp_path, text, 32, seed=1)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert base_of_run("tiny", tmp_path, text, 32, seed=1) == base      # the same again
    with pytest.raises(ValueError, match="an adapter of a run that began with other weights"):
        base_of_run("tiny", tmp_path, text, 32, seed=2)
    assert (base / "model.safetensors").read_bytes() == before
