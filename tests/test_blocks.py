"""Fine-tuning of models that write in blocks: LLaDA2's loss against its formula, answers that end
with a block, block lengths that grow and shrink, whole runs."""
import json

import pytest
import torch
from runs import command, learned, rows, succeed
from safetensors.torch import load_file
from scripts import run
from tiny import tiny_model

import kernels
from data.chat import ChatDataset
from data.prepare import prepare
from data.tokenizer import Tokenizer
from diffusion import block_loss, llada2_loss
from model import Config, Transformer
from passes import right_entropy, weighted_nll
from training.blocks import block_length_at, parse_schedule
from training.memory import plan_memory

MASK = 12
SHAPE = dict(vocab_size=13, dim=8, n_layers=1, n_heads=2, max_len=64, mask_token_id=MASK,
             block_length=4)


def random_model(**options):
    """In double precision, with predictions that are far from uniform."""
    model = Transformer(Config(**SHAPE | options)).init_weights().double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim >= 2:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.6)
    return model


def a_batch():
    """(tokens, maskable, t, mask) of three rows of 12 tokens, blocks of 4."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(12, (3, 12), generator=generator)
    maskable = torch.rand(3, 12, generator=generator) < 0.8
    t = torch.tensor([0.3, 0.5, 0.75])
    mask = torch.rand(3, 12, generator=generator) < t[:, None]
    return tokens, maskable, t, mask


def by_formula(model, tokens, maskable, t, mask, block=4):
    """[(nll, entropy, is right, t)] of every masked token, one pass a block: what stands before it
    is clean, what stands after is not there."""
    found = []
    for row in range(len(tokens)):
        hidden = mask[row] & maskable[row]
        for begin in range(0, tokens.shape[1], block):
            x = tokens[row, :begin + block].clone()
            where = [i for i in range(begin, begin + block) if hidden[i]]
            x[where] = MASK
            block_of = torch.arange(len(x)) // block
            logits = model(x[None], attention_mask=(block_of <= block_of[:, None])[None])[0]
            for i in where:
                place = max(i - 1, 0) if model.config.shift and i % block else i
                if model.config.shift and i % block == 0 and i:     # from the clean block before
                    clean = tokens[row, :begin]
                    seen = (block_of[:begin] <= block_of[:begin, None])[None]
                    log_p = model(clean[None], attention_mask=seen)[0, -1].log_softmax(-1)
                else:
                    log_p = logits[place].log_softmax(-1)
                entropy = -(log_p.exp() * log_p).sum()
                right = log_p.argmax() == tokens[row, i]
                found.append((-log_p[tokens[row, i]], entropy, right, t[row]))
    return found


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("complement", [False, True])
def test_llada2_loss_is_its_formula(shift, bound, complement):
    model = random_model(shift=shift)
    tokens, maskable, t, mask = a_batch()
    found = by_formula(model, tokens, maskable, t, mask)
    count = maskable.sum() * (1 + complement)
    if complement:
        found += by_formula(model, tokens, maskable, 1 - t, ~mask)
        assert len(found) == maskable.sum()             # each token once
    right = [entropy for _, entropy, right, _ in found if right]
    assert 0 < len(right) < len(found)
    nats = sum(nll / time for nll, _, _, time in found)
    expected = nats / count
    if not bound:
        expected = sum(nll for nll, *_ in found) / len(found)
    expected = expected + 0.3 * sum(right) / len(right)
    loss = llada2_loss(model, tokens, 4, maskable, t, mask, complement, bound, cap_weight=0.3)
    assert torch.allclose(loss.loss, expected)
    assert torch.allclose(loss.nelbo, nats.detach() / count) and loss.count == count
    ours = torch.autograd.grad(loss.loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine, other, atol=1e-7)


def test_the_bound_of_single_rows_is_block_diffusion_s():
    model, (tokens, maskable, t, mask) = random_model(), a_batch()
    ours = llada2_loss(model, tokens, 4, maskable, t, mask, complement=False, bound=True)
    theirs = block_loss(model, tokens, 4, t, mask, maskable)
    assert torch.allclose(ours.loss, theirs.loss)
    assert torch.equal(ours.token_nll, theirs.token_nll)


def test_times_are_in_the_band_and_a_pair_shares_what_is_masked():
    model, (tokens, maskable, *_) = random_model(), a_batch()
    loss = llada2_loss(model, tokens.repeat(9, 1), 4, maskable.repeat(9, 1),
                       generator=torch.Generator().manual_seed(0))
    once, again = loss.t.chunk(2)
    assert 0.3 < once.min() < 0.4 and 0.7 < once.max() < 0.8
    assert torch.allclose(once + again, torch.ones_like(once))
    once, again = loss.is_masked.chunk(2)
    assert torch.equal(once ^ again, maskable.repeat(9, 1)) and not (once & again).any()
    # Time 1 leaves nothing to the other half, whose weight would be infinite.
    ends = llada2_loss(model, tokens, 4, t=torch.ones(3), mask=torch.ones(3, 12) > 0, bound=True)
    assert ends.loss.isfinite() and ends.nelbo.isfinite()


@pytest.mark.parametrize("arguments, words", [
    (dict(block_length=5), "block_length 5 does not divide the 12 tokens"),
    (dict(block_length=4, t=torch.ones(2, 3)), "t must have shape"),
    (dict(block_length=4, t=torch.ones(3, 2)), "t must have shape"),
    (dict(block_length=4, mask=torch.ones(3, 11) > 0), "mask must have the shape of tokens"),
])
def test_losses_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        llada2_loss(random_model(), a_batch()[0], **arguments)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_entropies_without_logits_equal_the_plain_line(dtype, tolerance, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, dtype=dtype, generator=generator) for n in (7, 11))
    targets = torch.randint(11, (7,), generator=generator)
    w, e = torch.rand(2, 7, generator=generator, dtype=torch.float64).to(dtype).float()
    found = []
    for plain in (True, False):
        monkeypatch.setattr(kernels, "PLAIN", plain)
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total, nll = kernels.linear_cross_entropy(*inputs, None, targets, w, 3, e)
        found.append((total, nll, *torch.autograd.grad(total, inputs)))
        chosen = kernels.linear_argmax(hidden, weight, None, 3)
        assert torch.equal(chosen, (hidden @ weight.T).argmax(-1))
    for mine, other in zip(*found):
        assert torch.allclose(mine.double(), other.double(), atol=tolerance, rtol=tolerance)


def test_a_model_that_only_makes_logits_has_the_same_loss():
    model, (tokens, _, _, mask) = random_model(), a_batch()

    class Bare:
        config = model.config

        def __call__(self, *arguments, **options):
            return model(*arguments, **options)

    arguments = tokens, tokens, mask, torch.ones(3, 12)
    ours, theirs = (weighted_nll(m, *arguments, cap_weight=0.5)[0] for m in (model, Bare()))
    assert torch.allclose(ours, theirs)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert right_entropy(logits, torch.tensor([1, 0])) == 0         # none is right


# ---- data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of conversations with answers of one to four words."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for number in range(40):
        answer = " ".join(["cat"] * (1 + number % 4))
        lines.append(json.dumps({"prompt": f"{number}?", "response": answer}))
    path.write_text("\n".join(lines))
    return path


def test_answers_end_where_a_block_does(chats):
    data = ChatDataset(prepare(str(chats), "byte", 300), 64, "eos", block_length=8)
    batch = data.batch("train", 8, seed=0, step=0)
    for tokens, maskable in zip(batch.tokens, batch.maskable):
        written = int((tokens != data.eos_token_id).nonzero().max()) + 1    # without the padding
        last = int(maskable.nonzero().max()) + 1
        assert last % 8 == 0 and 0 <= last - written < 8
        assert maskable[written:last].all()


# ---- block lengths that change -------------------------------------------------------------------


def test_block_lengths_in_turn():
    stages = parse_schedule("1, 4,32,T*2,32")
    assert [stage.length for stage in stages] == [1, 4, 32, 0, 32]
    at = [block_length_at(stages, progress / 12) for progress in range(13)]
    assert at == [1, 1, 4, 4, 32, 32, 0, 0, 0, 0, 32, 32, 32]
    for text in ("", "4,x", "4*0", "4*x", "-4", "4,,8"):
        with pytest.raises(ValueError, match="block_schedule is a list like 1,4,32"):
            parse_schedule(text)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        parse_schedule("4,0")


def test_a_run_through_all_of_them(chats, tmp_path):
    """Five updates, five block lengths; the last one is the model's."""
    settings = ["--objective=bd3lm", "--anneal_steps=0", "--max_steps=5", "--eval_interval=0",
                "--block_length=8", "--sample_tokens=0"]
    out, schedule = tmp_path / "out", "--block_schedule=1,4,8,T,8"
    succeed(run(*command("convert_ar.py", out, chats, *settings, schedule)))
    model = Transformer.from_pretrained(out)
    assert model.config.block_length == 8 and rows(out)[-1]["step"] == 5
    straight = command("convert_ar.py", tmp_path / "straight", chats, *settings)
    succeed(run(*straight))
    assert rows(out) != rows(tmp_path / "straight")


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    ["--lora_rank=2", "--lora_targets=q,v,up", "--cap_weight=0.1"],
    ["--lora_rank=0", "--complement=False", "--dtype=bfloat16"],
    ["--lora_rank=2", "--block_weights=bound", "--t_low=0", "--t_high=1"],
], ids=["lora", "everything", "bound"])
def test_llada2_learns(chats, tmp_path, settings):
    """From random weights, in the published layout; the loss falls, and what it wrote is read."""
    out = tmp_path / "out"
    arguments = command("finetune_llada.py", out, chats, "--init_from=tiny:llada2",
                        "--seq_len=64", "--max_steps=4", "--eval_interval=3",
                        "--learning_rate=1e-2", *settings)
    succeed(run(*arguments))
    first, last = rows(out)
    assert last["train_loss"] < first["train_loss"]
    names = set(learned(out))
    if "--lora_rank=0" in settings:
        assert "model.layers.1.mlp.experts.0.gate_proj.weight" in names | set(published(out))
        assert Transformer.from_pretrained(out).config.family == "llada2"
    else:
        assert any("experts" in name for name in names) == ("up" in settings[1])


def published(folder):
    """The names of a model's tensors in its family's own layout."""
    Transformer.from_pretrained(folder).export_pretrained(folder / "published")
    return load_file(folder / "published" / "model.safetensors")


def test_our_own_model_in_blocks(chats, tmp_path):
    """It lacks the tokens of a chat and has blocks of 4."""
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model(block_length=4, vocab_size=258).save_pretrained(base)
    Tokenizer.bytes().save_pretrained(base)
    arguments = command("finetune_llada.py", out, chats, f"--init_from={base}", "--seq_len=64",
                        "--max_steps=2", "--eval_interval=0")
    succeed(run(*arguments))
    assert Transformer.from_pretrained(out / "base").config.block_length == 4


def test_the_plan_counts_noisy_and_clean_tokens_twice():
    plans = []
    for block_length in (4, 0):
        config = Config(**SHAPE | dict(block_length=block_length, dim=32, n_layers=3))
        plans.append(plan_memory(config, 64, 2, lora_rank=2, dtype=torch.float32,
                                 checkpoint_blocks=False))
    in_blocks, plain = plans
    assert 3 < in_blocks.activations / plain.activations < 4
    assert in_blocks.weights == plain.weights

