"""Every published family gives the reference's logits, and goes back: against the fixtures and
against transformers itself."""

import json
from pathlib import Path

import pytest
import torch
from runs import refused
from safetensors.torch import load_file, save_file
from scripts import in_fork, run_here

from experiments.bench_model import peaks_of_loading, write_checkpoint
from model import Config, Transformer
from pretrained.config import interpret, read_config
from pretrained.families import FAMILIES
from pretrained.load import describe, load
from pretrained.tensors import tensor_table

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT.parent / "shared" / "fixtures"
TOLERANCE = 2e-4  # of the largest logit, float32
CAUSAL = "gpt2", "llama", "qwen2", "qwen3", "qwen3_moe"
PUBLISHED = [family for family in FAMILIES if family != "unmask"]

# Six configurations and more for each family that transformers has: overrides of BASE.
ROPE = dict(
    vocab_size=150,
    hidden_size=48,
    intermediate_size=70,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
ENCODER = dict(
    vocab_size=150,
    hidden_size=48,
    intermediate_size=70,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=130,
)
BASE = {
    "llama": ROPE,
    "qwen2": dict(ROPE, use_sliding_window=False),
    "qwen3": dict(ROPE, head_dim=16),
    "qwen3_moe": dict(
        ROPE, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=20
    ),
    "bert": ENCODER,
    "roberta": dict(ENCODER, pad_token_id=1),
    "modernbert": dict(
        ENCODER,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=16,
        num_hidden_layers=5,
        max_position_embeddings=512,
        reference_compile=False,
    ),
    "gpt2": dict(
        vocab_size=150,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=130,
        bos_token_id=3,
        eos_token_id=3,
    ),
}
VARIANTS = {
    "llama": [
        dict(),
        dict(num_key_value_heads=1, tie_word_embeddings=True),
        dict(num_key_value_heads=4, attention_bias=True),
        dict(head_dim=10, mlp_bias=True, attention_bias=True),
        dict(rope_scaling=LLAMA3, rope_theta=500000.0),
        dict(rope_scaling=dict(rope_type="linear", factor=3.0), hidden_act="gelu_pytorch_tanh"),
        dict(
            hidden_size=42,
            num_attention_heads=7,
            num_key_value_heads=7,
            rms_norm_eps=0.001,
            hidden_act="relu",
        ),
        dict(
            num_hidden_layers=1,
            num_attention_heads=6,
            num_key_value_heads=3,
            hidden_act="gelu_new",
            eos_token_id=[5, 6],
        ),
    ],
    "qwen2": [
        dict(),
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=1, tie_word_embeddings=True),
        dict(rope_theta=1000000.0, rms_norm_eps=0.001),
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=3),
        dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
        dict(rope_scaling=LLAMA3, hidden_act="gelu", num_hidden_layers=3),
    ],
    "qwen3": [
        dict(),
        dict(head_dim=10, num_key_value_heads=4),
        dict(tie_word_embeddings=True, num_key_value_heads=1),
        dict(attention_bias=True),
        dict(hidden_size=30, num_attention_heads=5, num_key_value_heads=5, head_dim=22),
        dict(rope_scaling=LLAMA3, rope_theta=1000000.0),
        dict(hidden_act="gelu_fast", rms_norm_eps=0.001, num_hidden_layers=1),
    ],
    "qwen3_moe": [
        dict(),
        dict(norm_topk_prob=True, num_experts_per_tok=3),
        dict(num_experts=1, num_experts_per_tok=1, moe_intermediate_size=33),
        dict(num_hidden_layers=4, mlp_only_layers=[0, 2], attention_bias=True),
        dict(num_experts=0),
        dict(norm_topk_prob=True, num_experts_per_tok=1, tie_word_embeddings=True),
        dict(num_experts=5, num_experts_per_tok=5, hidden_act="gelu_fast"),
    ],
    "bert": [
        dict(),
        dict(hidden_size=45, num_attention_heads=3),
        dict(hidden_act="relu", type_vocab_size=1),
        dict(hidden_act="gelu_new"),
        dict(tie_word_embeddings=False),
        dict(layer_norm_eps=0.001, num_hidden_layers=3),
        dict(num_attention_heads=1, intermediate_size=33),
    ],
    "roberta": [
        dict(),
        dict(hidden_size=45, num_attention_heads=3),
        dict(hidden_act="relu", type_vocab_size=1),
        dict(pad_token_id=7),
        dict(tie_word_embeddings=False),
        dict(layer_norm_eps=0.001, num_hidden_layers=3),
        dict(hidden_act="gelu_pytorch_tanh"),
    ],
    "modernbert": [
        dict(),
        dict(local_attention=6, global_attn_every_n_layers=2),
        dict(norm_bias=True, attention_bias=True, mlp_bias=True),
        dict(classifier_bias=True, decoder_bias=False),
        dict(hidden_size=30, num_attention_heads=5, tie_word_embeddings=False),
        dict(global_attn_every_n_layers=1, hidden_activation="silu"),
        dict(global_rope_theta=500000.0, local_rope_theta=100.0, norm_eps=0.001),
        dict(classifier_activation="relu", hidden_activation="gelu_new", num_hidden_layers=2),
        dict(global_rope_theta=500.0, local_rope_theta=None),   # none of their own: the global one
    ],
    "gpt2": [
        dict(),
        dict(n_inner=70),
        dict(n_embd=45, n_head=3),
        dict(activation_function="relu"),
        dict(tie_word_embeddings=False),
        dict(layer_norm_epsilon=0.001, n_layer=3, activation_function="gelu"),
        dict(n_embd=35, n_head=5),
    ],
}
CASES = [(family, number) for family in VARIANTS for number in range(len(VARIANTS[family]))]


def reference_model(family, **overrides):
    """A random model of transformers, every weight and bias of it moved away from its initial
    value."""
    config = transformers.AutoConfig.for_model(family, **{**BASE[family], **overrides})
    kind = (
        transformers.AutoModelForCausalLM if family in CAUSAL else transformers.AutoModelForMaskedLM
    )
    torch.manual_seed(0)
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def random_tokens(batch_size, length, vocab_size=150):
    return torch.randint(
        8, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(1)
    )


def difference(ours, theirs, valid=None):
    """The largest absolute difference relative to the largest logit, over the valid positions."""
    valid = torch.ones(ours.shape[:2], dtype=torch.bool) if valid is None else valid
    assert ours.isfinite().all() and ours.shape == theirs.shape
    return ((ours - theirs)[valid].abs().max() / theirs[valid].abs().max()).item()


@torch.no_grad()
def their_logits(model, tokens, mask=None, opened=False):
    if opened:  # a mask of four dimensions is taken as it is: everyone sees everyone
        mask = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1], dtype=model.dtype)
    return model(tokens, attention_mask=mask).logits


@torch.no_grad()
def our_logits(model, tokens, mask=None):
    return model(tokens, attention_mask=mask)


def read_folder(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def assert_same_checkpoint(a, b):
    (config_a, weights_a), (config_b, weights_b) = read_folder(a), read_folder(b)
    assert config_a == config_b
    assert weights_a.keys() == weights_b.keys()
    for name in weights_a:
        assert weights_a[name].dtype == weights_b[name].dtype and torch.equal(
            weights_a[name], weights_b[name]
        ), name


# --------------------------------------------------------------------------------------------------
# the fixtures


@pytest.fixture(params=PUBLISHED)
def fixture(request):
    folder = FIXTURES / request.param.lower()
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder}")
    return folder


def test_fixture_logits(fixture):
    model, io = Transformer.from_pretrained(fixture), load_file(fixture / "io.safetensors")
    assert difference(our_logits(model, io["input_ids"]), io["logits"]) < TOLERANCE
    if "logits_padded" in io:
        mask = io["attention_mask"]
        assert (
            difference(
                our_logits(model, io["input_ids_padded"], mask), io["logits_padded"], mask.bool()
            )
            < TOLERANCE
        )
    if "logits_bidirectional" in io:
        model = Transformer.from_pretrained(fixture, causal=False)
        assert (
            difference(our_logits(model, io["input_ids"]), io["logits_bidirectional"]) < TOLERANCE
        )


def test_fixture_goes_out_and_back(fixture, tmp_path):
    """Import, export: the same files. Import, our layout, import, export: the same again, and the
    same logits on the way."""
    model, tokens = (
        Transformer.from_pretrained(fixture),
        load_file(fixture / "io.safetensors")["input_ids"],
    )
    model.export_pretrained(tmp_path / "exported")
    assert_same_checkpoint(fixture, tmp_path / "exported")
    model.save_pretrained(tmp_path / "ours")
    again = Transformer.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(our_logits(model, tokens), our_logits(again, tokens))
    again.export_pretrained(tmp_path / "exported_again")
    assert_same_checkpoint(fixture, tmp_path / "exported_again")
    assert (tmp_path / "ours" / "generation_config.json").exists() == (
        fixture / "generation_config.json"
    ).exists()


# --------------------------------------------------------------------------------------------------
# against transformers


@pytest.mark.parametrize(("family", "number"), CASES)
def test_logits_of_transformers(family, number, tmp_path):
    theirs = reference_model(family, **VARIANTS[family][number])
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = (
        Transformer.from_pretrained(tmp_path / "theirs"),
        random_tokens(2, 120),
    )  # 120: far past the local windows
    assert difference(our_logits(ours, tokens), their_logits(theirs, tokens)) < TOLERANCE
    assert (
        difference(our_logits(ours, tokens[:, :1]), their_logits(theirs, tokens[:, :1])) < TOLERANCE
    )

    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0  # padding much longer than a local window
    padded = tokens.masked_fill(mask == 0, theirs.config.pad_token_id or 0)
    assert (
        difference(our_logits(ours, padded, mask), their_logits(theirs, padded, mask), mask.bool())
        < TOLERANCE
    )
    if family in CAUSAL:
        opened = Transformer.from_pretrained(tmp_path / "theirs", causal=False)
        assert (
            difference(our_logits(opened, tokens), their_logits(theirs, tokens, opened=True))
            < TOLERANCE
        )

    ours.export_pretrained(tmp_path / "exported")
    assert_same_checkpoint(tmp_path / "theirs", tmp_path / "exported")
    back = type(theirs).from_pretrained(tmp_path / "exported")
    # Not bit for bit: the small products of experts round by where their memory happens to lie.
    assert difference(their_logits(back, tokens), their_logits(theirs, tokens)) < 1e-6


def test_modernbert_past_its_window_and_llama_past_its_context(tmp_path):
    for family, length, overrides in (
        ("modernbert", 400, dict(local_attention=128)),
        ("llama", 1024, dict(rope_scaling=LLAMA3, max_position_embeddings=256)),
    ):
        theirs, tokens = reference_model(family, **overrides), random_tokens(1, length)
        theirs.save_pretrained(tmp_path / family)
        ours = Transformer.from_pretrained(tmp_path / family)
        assert difference(our_logits(ours, tokens), their_logits(theirs, tokens)) < TOLERANCE


LLADA_NAMES = [
    ("model.embed_tokens", "model.transformer.wte"),
    ("model.layers", "model.transformer.blocks"),
    ("model.norm", "model.transformer.ln_f"),
    ("lm_head", "model.transformer.ff_out"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ff_norm"),
    ("self_attn.o_proj", "attn_out"),
    ("self_attn.", ""),
    ("mlp.gate_proj", "ff_proj"),
    ("mlp.up_proj", "up_proj"),
    ("mlp.down_proj", "ff_out"),
]


def write_llada(theirs, folder):
    """A Llama of transformers as a LLaDA checkpoint."""
    config, weights = theirs.config, {}
    for name, tensor in theirs.state_dict().items():
        for old, new in LLADA_NAMES:
            name = name.replace(old, new)
        weights[name] = tensor.clone()
    if config.tie_word_embeddings:
        del weights["model.transformer.ff_out.weight"]
    raw = dict(
        model_type="llada",
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        mlp_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        embedding_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        weight_tying=config.tie_word_embeddings,
        include_qkv_bias=False,
        include_bias=False,
        block_type="llama",
        layer_norm_type="rms",
        rope=True,
        activation_type="silu",
        mask_token_id=140,
        eos_token_id=3,
        torch_dtype="float32",
    )
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))


def write_dream(theirs, folder):
    """A Qwen2 of transformers as a Dream checkpoint: the same names, another config."""
    theirs.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("layer_types")
    raw.update(
        model_type="Dream", architectures=["DreamModel"], mask_token_id=140, sliding_window=None
    )
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_llada_and_dream_are_llama_and_qwen2_opened(family, number, tmp_path):
    overrides = [
        dict(),
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=1, rope_theta=5e5),
        dict(hidden_size=60, num_attention_heads=6),
        dict(tie_word_embeddings=True, rms_norm_eps=1e-3),
    ][number]
    theirs = reference_model("llama" if family == "llada" else "qwen2", **overrides)
    (write_llada if family == "llada" else write_dream)(theirs, tmp_path / "published")
    ours, tokens = Transformer.from_pretrained(tmp_path / "published"), random_tokens(2, 120)
    assert (
        ours.config.family == family
        and ours.config.shift == (family == "Dream")
        and ours.config.mask_token_id == 140
    )
    assert (
        difference(our_logits(ours, tokens), their_logits(theirs, tokens, opened=True)) < TOLERANCE
    )
    ours.export_pretrained(tmp_path / "exported")
    (raw, before), (exported, after) = (
        read_folder(tmp_path / "published"),
        read_folder(tmp_path / "exported"),
    )
    assert exported == {"architectures": ["LLaDAModelLM"], **raw}
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


@pytest.mark.parametrize("family", [family for family in VARIANTS if family != "qwen3_moe"])
def test_bfloat16_on_the_cpu(family, tmp_path):
    """Both round differently, so both differ from float32: ours by no more than theirs, and from
    theirs by no more than both. (A token whose rounded scores choose another expert is off by
    chance: no test of a mixture.)"""
    theirs, tokens = reference_model(family), random_tokens(2, 60)
    exact = their_logits(theirs, tokens)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    rounded = their_logits(theirs, tokens).float()
    ours = Transformer.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    mine, scale = our_logits(ours, tokens).float(), exact.abs().max()
    their_error, our_error = (
        (logits - exact).square().mean().sqrt() / scale for logits in (rounded, mine)
    )
    assert our_error < 1.25 * their_error < 0.03
    assert (mine - rounded).square().mean().sqrt() / scale < 1.5 * their_error


def test_our_own_models_export_as_qwen3(tmp_path):
    model = Transformer(
        Config(
            vocab_size=150,
            dim=48,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            head_dim=16,
            causal=True,
            eos_token_id=3,
            mask_token_id=149,
        )
    ).init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
            )
    model.export_pretrained(tmp_path)
    theirs, tokens = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
        random_tokens(2, 40),
    )
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert difference(our_logits(model, tokens), their_logits(theirs, tokens)) < TOLERANCE
    back = Transformer.from_pretrained(tmp_path)
    assert back.config.family == "qwen3" and torch.equal(
        our_logits(back, tokens), our_logits(model, tokens)
    )


@pytest.mark.parametrize("change", [dict(), dict(shift=True), dict(block_length=8)])
@pytest.mark.parametrize("family", CAUSAL)
def test_an_opened_model_stays_open(family, change, tmp_path):
    """What is exported after a conversion comes back as what it was trained to be, and nothing but
    config.json says so."""
    theirs, tokens = reference_model(family), random_tokens(2, 20)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs", causal=False)
    for field, value in change.items():
        setattr(ours.config, field, value)
    ours.export_pretrained(tmp_path / "exported")
    (before, weights), (after, exported) = (
        read_folder(tmp_path / "theirs"),
        read_folder(tmp_path / "exported"),
    )
    assert after == {**before, "is_causal": False, **change} and weights.keys() == exported.keys()
    back = Transformer.from_pretrained(tmp_path / "exported")
    assert not back.config.causal and all(
        getattr(back.config, field) == value for field, value in change.items()
    )
    assert (
        difference(our_logits(back, tokens), their_logits(theirs, tokens, opened=True)) < TOLERANCE
    )
    closed = Transformer.from_pretrained(tmp_path / "exported", causal=True)
    assert difference(our_logits(closed, tokens), their_logits(theirs, tokens)) < TOLERANCE
    closed.config.shift, closed.config.block_length = False, 0
    closed.export_pretrained(tmp_path / "closed")
    assert Transformer.from_pretrained(tmp_path / "closed").config.causal


@pytest.mark.parametrize("family", CAUSAL)
def test_what_dllm_converts_is_open(family, tmp_path):
    """dLLM gives a family whose attention it opened a model type of its own; the block length of a
    BD3-LM is added by hand."""
    theirs, tokens = reference_model(family), random_tokens(2, 20)
    theirs.save_pretrained(tmp_path)
    raw, _ = read_folder(tmp_path)
    published = {
        **raw,
        "model_type": f"a2d-{family}",
        "architectures": ["A2DLMHeadModel"],
        "auto_map": {"AutoModelForMaskedLM": "modeling.A2DLMHeadModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    ours = Transformer.from_pretrained(tmp_path)
    assert not ours.config.causal and not ours.config.shift and ours.config.family == family
    assert (
        difference(our_logits(ours, tokens), their_logits(theirs, tokens, opened=True)) < TOLERANCE
    )
    assert f"model_type = 'a2d-{family}'" in describe(tmp_path)
    ours.export_pretrained(tmp_path / "exported")
    assert read_folder(tmp_path / "exported")[0] == published
    (tmp_path / "config.json").write_text(json.dumps({**published, "block_length": 32}))
    assert Transformer.from_pretrained(tmp_path).config.block_length == 32
    (tmp_path / "config.json").write_text(json.dumps({**published, "is_causal": "no"}))
    with pytest.raises(ValueError, match="causal must be true or false, got 'no'"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        dict(qk_norm=False),
        dict(norm="layer"),
        dict(mlp_bias=True),
        dict(qkv_bias=True),
        dict(gated=False),
        dict(positions="learned"),
        dict(embed_norm=True),
        dict(head_bias=True),
    ],
)
def test_what_a_family_cannot_express_is_not_exported(change, tmp_path):
    model = Transformer(Config(vocab_size=20, dim=16, n_layers=1, n_heads=2, **change))
    with pytest.raises(ValueError, match=f"cannot have {next(iter(change))} = "):
        model.export_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).config == model.config


def test_a_resized_vocabulary_is_exported(tmp_path):
    theirs = reference_model("bert")
    theirs.save_pretrained(tmp_path / "theirs")
    model = Transformer.from_pretrained(tmp_path / "theirs")
    model.embed.weight = model.head.weight = torch.nn.Parameter(
        torch.cat([model.embed.weight, torch.ones(3, 48)]).detach()
    )
    model.head.bias = torch.nn.Parameter(torch.cat([model.head.bias, torch.ones(3)]).detach())
    model.config.vocab_size, model.config.mask_token_id = 153, 152
    model.export_pretrained(tmp_path / "exported")
    back, tokens = type(theirs).from_pretrained(tmp_path / "exported"), random_tokens(2, 20, 153)
    assert back.config.vocab_size == 153 and back.config.mask_token_id == 152
    assert difference(our_logits(model, tokens), their_logits(back, tokens)) < TOLERANCE


# ---------------------------------------------------------------------------------------------
# checkpoints as they are published


def rewrite(folder, weights=None, config=None):
    """Change the weights and the config of a checkpoint folder, each by a function that returns the
    new one."""
    raw, tensors = read_folder(folder)
    if weights is not None:
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in weights(tensors).items()},
            folder / "model.safetensors",
        )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config(raw)))


def old_bert(tensors):
    """bert-base-uncased: TensorFlow's names of the norms, a pooler, the next-sentence head,
    position numbers, a tied head."""
    older = {}
    for name, tensor in tensors.items():
        older[
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
        ] = tensor
    return older | {
        "bert.pooler.dense.weight": torch.ones(48, 48),
        "bert.pooler.dense.bias": torch.ones(48),
        "cls.seq_relationship.weight": torch.ones(2, 48),
        "cls.seq_relationship.bias": torch.ones(2),
        "bert.embeddings.position_ids": torch.arange(130)[None],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
    }


def old_roberta(tensors):
    return tensors | {
        "roberta.embeddings.position_ids": torch.arange(130)[None],
        "lm_head.decoder.bias": tensors["lm_head.bias"],
        "lm_head.decoder.weight": tensors["roberta.embeddings.word_embeddings.weight"],
        "roberta.pooler.dense.weight": torch.ones(48, 48),
        "roberta.pooler.dense.bias": torch.ones(48),
    }


def old_gpt2(tensors):
    """openai-community/gpt2: no `transformer.` in front, and the causal masks among the weights."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = torch.ones(1, 1, 130, 130).tril()
    return tensors | {
        f"h.{layer}.attn.{name}": mask for layer in range(2) for name in ("bias", "masked_bias")
    }


def old_llama(tensors):
    return tensors | {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(6) for layer in range(2)
    }


def tied_llama(tensors):
    return {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}


@pytest.mark.parametrize(
    ("family", "overrides", "weights"),
    [
        ("bert", {}, old_bert),
        ("roberta", {}, old_roberta),
        ("gpt2", {}, old_gpt2),
        ("llama", {}, old_llama),
        ("llama", dict(tie_word_embeddings=True), tied_llama),
    ],
)
def test_weights_as_published(family, overrides, weights, tmp_path):
    theirs, tokens = reference_model(family, **overrides), random_tokens(2, 40)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, weights)
    ours = Transformer.from_pretrained(tmp_path)
    assert difference(our_logits(ours, tokens), their_logits(theirs, tokens)) < TOLERANCE
    ours.export_pretrained(tmp_path / "exported")
    back = type(theirs).from_pretrained(tmp_path / "exported")
    assert torch.equal(their_logits(back, tokens), their_logits(theirs, tokens))


def version_5(raw):
    """The config as transformers 5 writes it: rope_parameters, layer_types and dtype instead of the
    older keys."""
    rope = raw.pop("rope_scaling", None) or {"rope_type": "default"}
    if raw["model_type"] == "modernbert":
        every = raw.pop("global_attn_every_n_layers")
        raw["rope_parameters"] = {
            "full_attention": dict(rope, rope_theta=raw.pop("global_rope_theta")),
            "sliding_attention": dict(rope, rope_theta=raw.pop("local_rope_theta")),
        }
        layers = range(raw["num_hidden_layers"])
        raw["layer_types"] = [
            "sliding_attention" if layer % every else "full_attention" for layer in layers
        ]
    elif "rope_theta" in raw:
        raw["rope_parameters"] = dict(rope, rope_theta=raw.pop("rope_theta"))
        raw["layer_types"] = ["full_attention"] * raw["num_hidden_layers"]
    return raw


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", dict(rope_scaling=LLAMA3, rope_theta=5e5)),
        ("qwen2", dict(rope_theta=1e6)),
        ("qwen3", {}),
        (
            "modernbert",
            dict(global_attn_every_n_layers=2, global_rope_theta=5e5, local_rope_theta=100.0),
        ),
    ],
)
def test_configs_of_transformers_5(family, overrides, tmp_path):
    theirs = reference_model(family, **overrides)
    theirs.save_pretrained(tmp_path / "theirs")
    before, _ = read_config(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", config=version_5)
    after, _ = read_config(tmp_path / "theirs")
    before.published = after.published
    assert before == after
    model, tokens = Transformer.from_pretrained(tmp_path / "theirs"), random_tokens(2, 60)
    assert difference(our_logits(model, tokens), their_logits(theirs, tokens)) < TOLERANCE
    model.export_pretrained(tmp_path / "exported")
    old, new = (read_folder(tmp_path / name)[0] for name in ("theirs", "exported"))
    assert {key: new[key] for key in old} == old


ROPES = [
    ("llama", dict(rope_scaling=LLAMA3, rope_theta=5e5), dict(rope_theta=7e4, rope_scaling=None)),
    ("llama", dict(rope_theta=5e5), dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
    ("qwen2", dict(rope_theta=1e6), dict(rope_theta=3e3)),
    ("qwen3", dict(rope_theta=1e6), dict(rope_theta=3e3)),
    (
        "modernbert",
        dict(global_attn_every_n_layers=2, global_rope_theta=5e5, local_rope_theta=100.0),
        dict(rope_theta=7e4, local_rope_theta=500.0),
    ),
]


@pytest.mark.parametrize("is_changed", [False, True])
@pytest.mark.parametrize(("family", "overrides", "change"), ROPES)
def test_transformers_4_reads_what_transformers_5_wrote(
    family, overrides, change, is_changed, tmp_path
):
    """transformers 4 knows no rope_parameters and would take a theta of 10000 without a word."""
    theirs, tokens = reference_model(family, **overrides), random_tokens(2, 60)
    theirs.save_pretrained(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", config=version_5)
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    for field, value in change.items() if is_changed else ():
        setattr(ours.config, field, value)
    ours.export_pretrained(tmp_path / "exported")
    back = type(theirs).from_pretrained(tmp_path / "exported").eval()
    assert difference(our_logits(ours, tokens), their_logits(back, tokens)) < TOLERANCE
    again = Transformer.from_pretrained(tmp_path / "exported")
    assert torch.equal(our_logits(again, tokens), our_logits(ours, tokens))

    rope = read_folder(tmp_path / "exported")[0]["rope_parameters"]  # and transformers 5 the same
    if family == "modernbert":
        assert rope["full_attention"]["rope_theta"] == ours.config.rope_theta
        assert rope["sliding_attention"]["rope_theta"] == ours.config.local_rope_theta
    else:
        scaling = ours.config.rope_scaling or {"rope_type": "default"}
        assert rope == {**scaling, "rope_theta": ours.config.rope_theta}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "llama",
            dict(rope_theta=1e6, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
            "rope_theta is 1000000.0",
        ),
        (
            "llama",
            dict(
                rope_scaling=dict(LLAMA3),
                rope_parameters=dict(LLAMA3, factor=2.0, rope_theta=10000.0),
            ),
            "rope_scaling is",
        ),
        (
            "llama",
            dict(rope_theta=1e6, rope_scaling=dict(rope_type="default", rope_theta=5e5)),
            "rope_theta is 1000000.0",
        ),
        (
            "llama",
            dict(rope_parameters=dict(full_attention=dict(rope_theta=1e6))),
            "has one RoPE for all layers",
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_theta=10000.0, partial_rotary_factor=0.5)),
            "partial_rotary_factor = 0.5",
        ),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (
            "modernbert",
            dict(rope_parameters=dict(rope_theta=5e5)),
            "has one RoPE for each kind of layer",
        ),
        (
            "modernbert",
            dict(rope_parameters=dict(full_attention=dict(LLAMA3), sliding_attention={})),
            "does not scale its RoPE",
        ),
        (
            "modernbert",
            dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
            "rope_scaling = .* is not supported",
        ),
        (
            "modernbert",
            dict(global_attn_every_n_layers=2, layer_types=["full_attention"] * 5),
            "global_attn_every_n_layers is 2",
        ),
    ],
)
def test_ropes_that_contradict_each_other(family, changes, words, tmp_path):
    """Each version of transformers would read another one of the two."""
    reference_model(family).save_pretrained(tmp_path)
    rewrite(tmp_path, config=lambda raw: raw | changes)
    with pytest.raises(ValueError, match=words):
        read_config(tmp_path)


def test_an_export_says_its_dtype_in_one_way(tmp_path):
    reference_model("llama").save_pretrained(tmp_path / "theirs")
    rewrite(
        tmp_path / "theirs", config=lambda raw: dict(raw, dtype="float32", torch_dtype="float32")
    )
    Transformer.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16).export_pretrained(
        tmp_path / "exported"
    )
    raw, _ = read_folder(tmp_path / "exported")
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"


def body_names(family):
    """A function that takes the names' prefix away, as in a file of the body alone."""

    def rename(tensors):
        return {
            name.removeprefix(FAMILIES[family].prefix): tensor for name, tensor in tensors.items()
        }

    return rename


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", PUBLISHED)
def test_names_without_the_prefix(family, is_tied, tmp_path):
    """As a Qwen3Model, a BertModel and so on name their tensors; the head may be among them."""
    settings = dict(
        vocab_size=150,
        dim=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        head_dim=12,
        hidden_dim=64,
        max_len=64,
        n_experts=8,
        experts_per_token=2,
        expert_dim=20,
    )
    raw = {}
    for field, keys in FAMILIES[family].keys.items():
        for key in (keys,) if isinstance(keys, str) else keys:
            if field in settings:
                raw[key] = settings[field]
            if field == "tie_embeddings":
                raw[key] = is_tied
    config = Config(family=family, published=raw, **interpret(FAMILIES[family], raw)[0])
    model, tokens = Transformer(config).init_weights().eval(), random_tokens(2, 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
            )
    model.export_pretrained(tmp_path)
    assert FAMILIES[family].prefix
    rewrite(tmp_path, body_names(family))
    assert not any(name.startswith(FAMILIES[family].prefix) for name in read_folder(tmp_path)[1])
    assert torch.equal(
        our_logits(Transformer.from_pretrained(tmp_path), tokens), our_logits(model, tokens)
    )


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "gpt2"])
def test_a_body_without_its_head(family, tmp_path):
    """Qwen3-Embedding: tied, all is there; untied, the head is missing."""
    theirs, tokens = reference_model(family, tie_word_embeddings=True), random_tokens(2, 20)
    theirs.base_model.save_pretrained(tmp_path / "tied")
    assert not any("head" in name for name in read_folder(tmp_path / "tied")[1])
    ours = Transformer.from_pretrained(tmp_path / "tied")
    assert difference(our_logits(ours, tokens), their_logits(theirs, tokens)) < TOLERANCE
    reference_model(family, tie_word_embeddings=False).base_model.save_pretrained(
        tmp_path / "untied"
    )
    with pytest.raises(
        ValueError,
        match=r"lack the tensor lm_head.weight: the head that predicts tokens is missing",
    ):
        Transformer.from_pretrained(tmp_path / "untied")


@pytest.mark.parametrize("family", list(VARIANTS))
def test_a_tied_model_of_which_the_head_alone_is_stored(family, tmp_path):
    theirs, tokens = reference_model(family, tie_word_embeddings=True), random_tokens(2, 20)
    theirs.save_pretrained(tmp_path)
    table = tensor_table(Transformer.from_pretrained(tmp_path))
    embed, head = (
        next(name for name, ours, _ in table if ours == [which])
        for which in ("embed.weight", "head.weight")
    )

    def head_alone(tensors):
        tensors[head] = tensors.pop(embed)
        return tensors

    rewrite(tmp_path, head_alone)
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.head.weight is ours.embed.weight
    assert difference(our_logits(ours, tokens), their_logits(theirs, tokens)) < TOLERANCE


def test_a_tied_model_of_ours_of_which_the_head_alone_is_stored(tmp_path):
    model, tokens = (
        Transformer(Config(vocab_size=150, dim=16, n_layers=1, n_heads=2, tie_embeddings=True)),
        random_tokens(1, 9),
    )
    model.init_weights().save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {
            name.replace("embed.weight", "head.weight"): tensor for name, tensor in tensors.items()
        },
    )
    assert torch.equal(
        our_logits(Transformer.from_pretrained(tmp_path), tokens), our_logits(model, tokens)
    )


def test_a_bias_that_is_stored_by_its_second_name_alone(tmp_path):
    theirs, tokens = reference_model("bert"), random_tokens(1, 9)
    theirs.save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {
            name.replace("cls.predictions.bias", "cls.predictions.decoder.bias"): tensor
            for name, tensor in tensors.items()
        },
    )
    assert (
        difference(
            our_logits(Transformer.from_pretrained(tmp_path), tokens), their_logits(theirs, tokens)
        )
        < TOLERANCE
    )


@pytest.mark.parametrize("has_prefix", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_encoder_without_its_head(family, has_prefix, tmp_path):
    """all-MiniLM-L6-v2: position numbers and a pooler are there, the masked-LM head is not."""
    theirs, tokens = reference_model(family, tie_word_embeddings=False), random_tokens(2, 20)
    theirs.base_model.save_pretrained(tmp_path / "theirs")
    prefix = FAMILIES[family].prefix if has_prefix else ""

    def as_published(tensors):
        if family != "modernbert":
            tensors |= {
                "embeddings.position_ids": torch.arange(130)[None],
                "pooler.dense.bias": torch.ones(48),
            }
        return {prefix + name: tensor for name, tensor in tensors.items()}

    rewrite(tmp_path / "theirs", as_published)
    with pytest.raises(
        ValueError,
        match=r"lack the tensor .*: they are an encoder without the head .* convert_bert.py",
    ):
        Transformer.from_pretrained(tmp_path / "theirs")
    ours, again = (load(tmp_path / "theirs", fresh_head=True) for _ in range(2))
    assert ours.fresh_head and ours.head.weight is ours.embed.weight and ours.config.tie_embeddings
    assert torch.equal(our_logits(ours, tokens), our_logits(again, tokens))  # on every process
    assert not any(parameter.is_meta for parameter in ours.parameters())
    assert ours.head_dense.weight.std() > 0.01 and (ours.head_norm.weight == 1).all()
    if ours.head.bias is not None:
        assert not ours.head.bias.any()
    ours.export_pretrained(tmp_path / "exported")
    back = type(theirs).from_pretrained(tmp_path / "exported").eval()
    assert read_folder(tmp_path / "exported")[0]["architectures"] == [type(theirs).__name__]
    assert difference(our_logits(ours, tokens), their_logits(back, tokens)) < TOLERANCE
    with torch.no_grad():
        assert torch.equal(
            back.base_model(tokens)[0], theirs.base_model(tokens)[0]
        )  # the body is theirs


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_a_head_of_which_a_part_is_missing_is_damage(family, tmp_path):
    theirs = reference_model(family)
    theirs.save_pretrained(tmp_path)
    dense = next(
        name
        for name in read_folder(tmp_path)[1]
        if name.endswith("dense.weight") and ("head" in name or "cls" in name)
    )
    rewrite(
        tmp_path,
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != dense},
    )
    with pytest.raises(ValueError, match=f"the weights lack the tensor {dense}$"):
        load(tmp_path, fresh_head=True)
    theirs.save_pretrained(tmp_path)
    assert not load(tmp_path, fresh_head=True).fresh_head  # a whole one is kept


def test_other_spellings(tmp_path):
    """`type` for rope_type, an activation's old name, several ends of text, -1 for no padding, an
    explicit null."""
    reference_model("llama").save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        config=lambda raw: dict(
            raw,
            rope_scaling={"type": "linear", "factor": 2},
            hidden_act="swish",
            eos_token_id=[7, 8, 9],
            pad_token_id=-1,
            head_dim=None,
            num_key_value_heads=2,
        ),
    )
    config, origin = read_config(tmp_path)
    assert (
        config.rope_scaling == {"rope_type": "linear", "factor": 2} and config.activation == "silu"
    )
    assert config.eos_token_id == 7 and config.pad_token_id is None and config.head_dim == 12
    assert origin["dim"] == "hidden_size = 48" and origin["qk_norm"] == "every LlamaForCausalLM"


def with_ends(folder, ends, generation=None):
    """The folder of a tiny Llama with these ends in its two config files."""
    reference_model("llama").save_pretrained(folder)
    rewrite(folder, config=lambda raw: dict(raw, eos_token_id=ends))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


@pytest.mark.parametrize(
    "ends, generation, expected",
    [
        (5, None, (5,)),
        ([5], None, (5,)),
        ([7, 8, 9], None, (7, 8, 9)),
        ([7, 7, None, -1, 8], None, (7, 8)),
        (None, None, ()),
        ([-1], None, ()),
        ([None, 6, 5], None, (6, 5)),
        (5, 5, (5,)),
        (5, [5, 6], (5, 6)),
        ([5, 6], 6, (5, 6)),
        (None, [8, 9], (8, 9)),
        (3, [-1, 4], (3, 4)),
    ],
)
def test_all_ends_of_text_are_read_saved_and_exported(tmp_path, ends, generation, expected):
    """Llama 3 lists several, and some checkpoints list them in generation_config.json only."""
    model = Transformer.from_pretrained(with_ends(tmp_path / "theirs", ends, generation))
    assert model.config.ends == expected and model.config.eos_token_id == (
        expected[0] if expected else None
    )
    model.save_pretrained(tmp_path / "ours")
    model.export_pretrained(tmp_path / "exported")
    for name in ("ours", "exported"):
        assert read_config(tmp_path / name)[0].ends == expected
    exported = json.loads((tmp_path / "exported/config.json").read_text())
    if generation is None:
        assert exported == json.loads((tmp_path / "theirs/config.json").read_text()) | {
            "dtype": exported["dtype"]
        }
    else:
        assert (tmp_path / "exported/generation_config.json").read_bytes() == (
            tmp_path / "theirs/generation_config.json"
        ).read_bytes()
        assert exported["eos_token_id"] == (expected[0] if len(expected) == 1 else list(expected))


def test_what_an_older_config_of_ours_lacks_is_the_family_s(tmp_path):
    """Dream's habits of sampling became fields of Config later than some of its models were
    saved."""
    for family in ("Dream", "llada"):
        Transformer(
            Config(family=family, vocab_size=20, dim=16, n_layers=1, n_heads=2, qk_norm=False)
        ).save_pretrained(tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
        for field in ("step_schedule", "confidence_at_temperature", "causal", "shift"):
            del raw[field]
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config, origin = read_config(tmp_path)
        is_dream = family == "Dream"
        assert config.step_schedule == ("timesteps" if is_dream else "even")
        assert config.confidence_at_temperature == is_dream
        assert origin.get("step_schedule") == ("every DreamModel" if is_dream else None)
        assert not config.causal and not config.shift  # what a model is, its file says


def test_an_end_of_text_that_was_changed(tmp_path):
    model = Transformer.from_pretrained(with_ends(tmp_path / "theirs", [7, 8], [7, 8]))
    config = model.config
    config.put_end_first(8)
    assert (config.eos_token_id, config.ends) == (8, (8, 7))
    config.put_end_first(4)
    assert config.ends == (4, 8, 7), "the tokenizer's own comes first, the others stay"
    config.eos_token_id = 3
    assert config.ends == (3,), "one that was set by hand is the only one"
    for write, name in ((model.save_pretrained, "ours"), (model.export_pretrained, "exported")):
        write(tmp_path / name)
        assert read_config(tmp_path / name)[0].ends == (3,)
    assert (
        json.loads((tmp_path / "exported/generation_config.json").read_text())["eos_token_id"] == 3
    ), "transformers reads this first"
    config.put_end_first(5)
    assert config.ends == (5,), "where there was one, it is replaced"
    config.eos_token_id = None
    assert config.ends == ()


def test_ends_of_text_that_cannot_be(tmp_path):
    for ends in ([], ["</s>"], [5, True], [5, -2], [[5]], {"a": 1}):
        with pytest.raises(ValueError, match="eos_token_id must be a token id"):
            read_config(with_ends(tmp_path, ends))
        with pytest.raises(
            ValueError, match="generation_config.json: eos_token_id must be a token id"
        ):
            read_config(with_ends(tmp_path, 5, ends))
    for wrong in (
        dict(eos_token_ids=5),
        dict(eos_token_ids=["a"]),
        dict(eos_token_id=1, eos_token_ids=[2, 3]),
    ):
        with pytest.raises(ValueError, match="eos_token_ids"):
            Config(**wrong)
    assert (
        Config(eos_token_ids=[4, 5]).eos_token_id == 4
        and Config(eos_token_id=4, eos_token_ids=[4]).eos_token_ids is None
    )
    reference_model("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, config=lambda raw: dict(raw, bos_token_id=[1, 2]))
    with pytest.raises(ValueError, match="bos_token_id must be a token id"):
        read_config(tmp_path)


# --------------------------------------------------------------------------------------------------
# files, types and memory


def shard(folder, count=3):
    """Split a checkpoint's one file as published ones are split."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-{i % count + 1:05}-of-{count:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["modernbert", "gpt2", "qwen3"])
def test_shards_and_dtypes(family, dtype, tmp_path):
    theirs = reference_model(family, tie_word_embeddings=family != "gpt2").to(dtype)
    theirs.save_pretrained(tmp_path)
    single = Transformer.from_pretrained(tmp_path)
    shard(tmp_path)
    sharded = Transformer.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in single.parameters()} == {dtype}
    assert (single.head.weight is single.embed.weight) == (family != "gpt2")
    for (name, a), (other, b) in zip(single.named_parameters(), sharded.named_parameters()):
        assert (
            name == other
            and torch.equal(a, b)
            and b.is_contiguous()
            and b.requires_grad
            and not b.is_meta
        )
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        converted = Transformer.from_pretrained(tmp_path, dtype=wanted)
        for a, b in zip(single.parameters(), converted.parameters()):
            assert b.dtype == wanted and torch.equal(a.to(wanted), b)


def test_mixed_dtypes_become_the_embeddings(tmp_path):
    reference_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {
            name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()
        },
    )
    model = Transformer.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert our_logits(model, random_tokens(1, 8)).dtype == torch.bfloat16


def test_a_hub_id_is_found_in_the_cache_off_line(tmp_path, monkeypatch):
    """The layout that huggingface_hub leaves behind, where HF_HUB_CACHE and HF_HUB_OFFLINE say: it
    read them when it was imported."""
    hub = tmp_path / "hub" / "models--someone--tiny"
    reference_model("qwen3").save_pretrained(hub / "snapshots" / "0123abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = run_here("model.py", "someone/tiny")
    assert found.status == 0 and "family qwen3" in found.out
    assert refused(run_here("model.py", "someone/else"), "there is no folder someone/else",
                   "pass a local folder")


def test_describe(tmp_path):
    theirs = reference_model("qwen3")
    theirs.save_pretrained(tmp_path)
    text = describe(tmp_path)
    assert f"family qwen3, {theirs.num_parameters():,} parameters" in text
    assert "2 layers of width 48, 4 heads of 16 (2 key/value heads)" in text
    assert (
        "hidden_size = 48" in text
        and "every Qwen3ForCausalLM" in text
        and "mask_token_id not given" in text
    )


def test_loading_takes_the_memory_of_the_weights(tmp_path):
    """60 MB each, after a first one without which what is imported late would count;
    `python experiments/bench.py load` measures a gigabyte."""
    cases = [("single", "float32", "float32", 1), ("single", "float32", "float32", 60),
             ("sharded", "bfloat16", "float32", 60), ("tied", "bfloat16", "bfloat16", 60)]
    sizes, checkpoints = [], []
    for number, (layout, stored, loaded, megabytes) in enumerate(cases):
        folder = str(tmp_path / str(number))
        sizes.append(write_checkpoint(folder, layout, stored, loaded, megabytes))
        checkpoints.append((folder, loaded))
    peaks = in_fork(peaks_of_loading, checkpoints)
    for case, size, peak in zip(cases[1:], sizes[1:], peaks[1:]):
        assert peak < 1.15 * size + 20e6, f"{case}: {size / 1e6:.0f} MB took {peak / 1e6:.0f} MB"
