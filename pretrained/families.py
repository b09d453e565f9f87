"""The published families as a table: how each writes down what `model.Config` and
`model.Transformer` hold.

The table is read in both directions, on loading and on export. To add a family, write down its
names in one more row of FAMILIES; model.py changes only if it computes something new. Where several
families agree, what they share stands above the table under a name of its own.
"""
from dataclasses import dataclass, field, replace


@dataclass
class Family:
    """How one published family writes down what `Config` and `Transformer` hold.

    architecture  the class that its own code loads it with
    keys          Config field -> key of its config.json; or a tuple of keys: the first that is
                  there counts, all are written
    fixed         Config fields that the family does not vary
    tensors       our module -> its module; a tuple of ours: one fused tensor; " ^T": stored
                  transposed; a second * is the number of an expert, whose matrix lies in a stack
    defaults      key -> what its own code takes when the key is missing
    only          key -> the values that this transformer can compute
    unused        a pattern of tensors that its files may hold and its logits do not need
    prefix        of the body's names; left out where the body was saved alone
    copies        tensor that some files hold too -> ours that it must equal
    offset        its learned positions start after the padding index (RoBERTa)
    spellings     its model_types in config.json, if not its name in the table; the first is written
    """
    architecture: str
    keys: dict
    fixed: dict
    tensors: dict
    defaults: dict = field(default_factory=dict)
    only: dict = field(default_factory=dict)
    unused: str = r"$^"
    prefix: str = ""
    copies: dict = field(default_factory=dict)
    offset: bool = False
    spellings: tuple = ()


# --------------------------------------------------------------------------------------------------
# What Llama, Qwen2, Qwen3 and Dream share

TOKEN_IDS = {"mask_token_id": "mask_token_id", "eos_token_id": "eos_token_id",
             "pad_token_id": "pad_token_id", "bos_token_id": "bos_token_id"}
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    **TOKEN_IDS,
}
LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA_TENSORS = {
    "embed": "model.embed_tokens",
    "blocks.*.attn_norm": "model.layers.*.input_layernorm",
    "blocks.*.attn.q": "model.layers.*.self_attn.q_proj",
    "blocks.*.attn.k": "model.layers.*.self_attn.k_proj",
    "blocks.*.attn.v": "model.layers.*.self_attn.v_proj",
    "blocks.*.attn.o": "model.layers.*.self_attn.o_proj",
    "blocks.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.mlp.gate": "model.layers.*.mlp.gate_proj",
    "blocks.*.mlp.up": "model.layers.*.mlp.up_proj",
    "blocks.*.mlp.down": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLAMA_UNUSED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
ROPE_ONLY = {"partial_rotary_factor": (None, 1.0)}
QWEN_ONLY = {**ROPE_ONLY, "use_sliding_window": (False,)}
BIAS_KEYS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
# RMSNorm, SwiGLU and RoPE are Config's defaults already.
PLAIN = {"qk_norm": False}

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    keys={**LLAMA_KEYS, **BIAS_KEYS},
    fixed={"causal": True},
    tensors={
        **LLAMA_TENSORS,
        "blocks.*.attn.q_norm": "model.layers.*.self_attn.q_norm",
        "blocks.*.attn.k_norm": "model.layers.*.self_attn.k_norm",
    },
    defaults={**LLAMA_DEFAULTS, "head_dim": 128},
    only=QWEN_ONLY,
    unused=LLAMA_UNUSED,
    prefix="model.",
)

# --------------------------------------------------------------------------------------------------
# Mixtures of experts

EXPERT_TENSORS = {
    "blocks.*.mlp.router": "model.layers.*.mlp.gate",
    "blocks.*.mlp.gates": "model.layers.*.mlp.experts.*.gate_proj",
    "blocks.*.mlp.ups": "model.layers.*.mlp.experts.*.up_proj",
    "blocks.*.mlp.downs": "model.layers.*.mlp.experts.*.down_proj",
}
QWEN3_MOE = replace(
    QWEN3,
    architecture="Qwen3MoeForCausalLM",
    keys={
        **QWEN3.keys,
        "n_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_dim": "moe_intermediate_size",
        "dense_layers": "mlp_only_layers",
        "router_norm": "norm_topk_prob",
    },
    tensors={**QWEN3.tensors, **EXPERT_TENSORS},
    defaults={
        **LLAMA_DEFAULTS,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
    },
    only={**QWEN_ONLY, "decoder_sparse_step": (1,)},
)
LLADA_MOE = Family(
    architecture="LLaDAMoEModelLM",
    keys={
        **LLAMA_KEYS,
        **BIAS_KEYS,
        "hidden_dim": "dense_intermediate_size",
        "rope_share": "partial_rotary_factor",
        "qk_norm": "qk_layernorm",
        "n_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_dim": "expert_intermediate_size",
        "shared_dim": "shared_expert_intermediate_size",
        "dense_layers": "moe_layer_freq",
        "router_bias": "moe_router_enable_expert_bias",
    },
    fixed={},
    tensors={
        **LLAMA_TENSORS,
        **EXPERT_TENSORS,
        "blocks.*.attn.q_norm": "model.layers.*.self_attn.q_norm",
        "blocks.*.attn.k_norm": "model.layers.*.self_attn.k_norm",
        "blocks.*.mlp.router_bias": "model.layers.*.mlp.expert_bias",
        "blocks.*.mlp.shared.gate": "model.layers.*.shared_expert.gate_proj",
        "blocks.*.mlp.shared.up": "model.layers.*.shared_expert.up_proj",
        "blocks.*.mlp.shared.down": "model.layers.*.shared_expert.down_proj",
    },
    # Its code ignores norm_topk_prob, moe_router_score_function, routed_scaling_factor and the
    # groups of its config.json: its weights are the biased probabilities as they are.
    defaults={
        **LLAMA_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "dense_intermediate_size": None,
        "num_experts": 0,
        "num_experts_per_tok": 1,
        "expert_intermediate_size": None,
        "shared_expert_intermediate_size": None,
        "partial_rotary_factor": 1.0,
        "qk_layernorm": False,
        "moe_layer_freq": None,
        "moe_router_enable_expert_bias": None,
    },
    only={"clip_qkv": (None,)},
    unused=LLAMA_UNUSED,
    prefix="model.",
    spellings=("lladamoe", "llada"),
)
LLADA2 = Family(
    architecture="LLaDA2MoeModelLM",
    keys={
        **LLAMA_KEYS,
        "rope_share": "partial_rotary_factor",
        "qk_norm": "use_qk_norm",
        "qkv_bias": "use_qkv_bias",
        "out_bias": "use_bias",
        "n_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_dim": "moe_intermediate_size",
        "shared_dim": "num_shared_experts",
        "dense_layers": "first_k_dense_replace",
        "router_groups": "n_group",
        "router_top_groups": "topk_group",
        "router_scale": "routed_scaling_factor",
    },
    fixed={"router": "sigmoid", "router_bias": "choice", "router_norm": True, "block_length": 32,
           "blocks_from_start": True, "threshold": 0.95},
    tensors={
        "embed": "model.word_embeddings",
        "blocks.*.attn_norm": "model.layers.*.input_layernorm",
        ("blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v"):
            "model.layers.*.attention.query_key_value",
        "blocks.*.attn.q_norm": "model.layers.*.attention.query_layernorm",
        "blocks.*.attn.k_norm": "model.layers.*.attention.key_layernorm",
        "blocks.*.attn.o": "model.layers.*.attention.dense",
        "blocks.*.mlp_norm": "model.layers.*.post_attention_layernorm",
        "blocks.*.mlp.gate": "model.layers.*.mlp.gate_proj",
        "blocks.*.mlp.up": "model.layers.*.mlp.up_proj",
        "blocks.*.mlp.down": "model.layers.*.mlp.down_proj",
        **EXPERT_TENSORS,
        "blocks.*.mlp.router_bias": "model.layers.*.mlp.gate.expert_bias",
        "blocks.*.mlp.shared.gate": "model.layers.*.mlp.shared_experts.gate_proj",
        "blocks.*.mlp.shared.up": "model.layers.*.mlp.shared_experts.up_proj",
        "blocks.*.mlp.shared.down": "model.layers.*.mlp.shared_experts.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    },
    defaults={
        **LLAMA_DEFAULTS,
        "intermediate_size": None,
        "moe_intermediate_size": None,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": True,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_shared_experts": 0,
        "first_k_dense_replace": 0,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
    only={"norm_head": (False,), "score_function": (None, "sigmoid"),
          "norm_topk_prob": (None, True), "use_sliding_window": (False,),
          "moe_router_enable_expert_bias": (None, True),
          "expert_capacity": (None, 0)},        # LLaDA2.2 chooses the experts of a whole block
    unused=r"model\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq",
    prefix="model.",
    spellings=("llada2_moe",),
)
# SDAR writes blocks as LLaDA2 does.
SDAR_FIXED = {"blocks_from_start": True, "threshold": 0.85}

# --------------------------------------------------------------------------------------------------
# What BERT and RoBERTa share

BERT_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_len": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "token_types": "type_vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    **TOKEN_IDS,
}
BERT_FIXED = {
    "positions": "learned",
    "norm": "layer",
    "norm_bias": True,
    "post_norm": True,
    "embed_norm": True,
    "qk_norm": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "gated": False,
    "head_transform": True,
    "head_bias": True,
}
BERT_DEFAULTS = {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "type_vocab_size": 2,
                 "tie_word_embeddings": True}
BERT_ONLY = {"position_embedding_type": ("absolute",), "is_decoder": (False,),
             "add_cross_attention": (False,)}
BERT_TENSORS = {
    "embed": "bert.embeddings.word_embeddings",
    "embed_positions": "bert.embeddings.position_embeddings",
    "embed_types": "bert.embeddings.token_type_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "blocks.*.attn.q": "bert.encoder.layer.*.attention.self.query",
    "blocks.*.attn.k": "bert.encoder.layer.*.attention.self.key",
    "blocks.*.attn.v": "bert.encoder.layer.*.attention.self.value",
    "blocks.*.attn.o": "bert.encoder.layer.*.attention.output.dense",
    "blocks.*.attn_norm": "bert.encoder.layer.*.attention.output.LayerNorm",
    "blocks.*.mlp.up": "bert.encoder.layer.*.intermediate.dense",
    "blocks.*.mlp.down": "bert.encoder.layer.*.output.dense",
    "blocks.*.mlp_norm": "bert.encoder.layer.*.output.LayerNorm",
}
ROBERTA_TENSORS = {ours: theirs.replace("bert.", "roberta.")
                   for ours, theirs in BERT_TENSORS.items()}

# --------------------------------------------------------------------------------------------------
# The table: model_type of config.json -> Family

FAMILIES = {
    "unmask": QWEN3,            # our own models, which are exported as this family
    "qwen3": QWEN3,
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys={**LLAMA_KEYS, **BIAS_KEYS, "mlp_bias": "mlp_bias"},
        fixed={**PLAIN, "causal": True},
        tensors=LLAMA_TENSORS,
        defaults=LLAMA_DEFAULTS,
        only=ROPE_ONLY,
        unused=LLAMA_UNUSED,
        prefix="model.",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        keys=LLAMA_KEYS,
        fixed={**PLAIN, "causal": True, "qkv_bias": True},
        tensors=LLAMA_TENSORS,
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 32768},
        only=QWEN_ONLY,
        unused=LLAMA_UNUSED,
        prefix="model.",
    ),
    "Dream": Family(
        architecture="DreamModel",
        keys=LLAMA_KEYS,
        fixed={**PLAIN, "qkv_bias": True, "shift": True, "step_schedule": "timesteps",
               "confidence_at_temperature": True},
        tensors=LLAMA_TENSORS,
        defaults=LLAMA_DEFAULTS,
        only=QWEN_ONLY,
        unused=LLAMA_UNUSED,
        prefix="model.",
    ),
    "llada": Family(
        architecture="LLaDAModelLM",
        keys={
            "vocab_size": ("embedding_size", "vocab_size"),
            "dim": "d_model",
            "n_layers": "n_layers",
            "n_heads": "n_heads",
            "n_kv_heads": "n_kv_heads",
            "hidden_dim": "mlp_hidden_size",
            "max_len": "max_sequence_length",
            "norm_eps": "rms_norm_eps",
            "rope_theta": "rope_theta",
            "activation": "activation_type",
            "tie_embeddings": "weight_tying",
            "qkv_bias": "include_qkv_bias",
            **TOKEN_IDS,
        },
        fixed=PLAIN,
        tensors={
            "embed": "model.transformer.wte",
            "blocks.*.attn_norm": "model.transformer.blocks.*.attn_norm",
            "blocks.*.attn.q": "model.transformer.blocks.*.q_proj",
            "blocks.*.attn.k": "model.transformer.blocks.*.k_proj",
            "blocks.*.attn.v": "model.transformer.blocks.*.v_proj",
            "blocks.*.attn.o": "model.transformer.blocks.*.attn_out",
            "blocks.*.mlp_norm": "model.transformer.blocks.*.ff_norm",
            "blocks.*.mlp.gate": "model.transformer.blocks.*.ff_proj",
            "blocks.*.mlp.up": "model.transformer.blocks.*.up_proj",
            "blocks.*.mlp.down": "model.transformer.blocks.*.ff_out",
            "norm": "model.transformer.ln_f",
            "head": "model.transformer.ff_out",
        },
        defaults={
            "embedding_size": None,
            "n_kv_heads": None,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "activation_type": "silu",
            "weight_tying": False,
            "include_qkv_bias": False,
        },
        only={
            "include_bias": (False,),
            "block_type": ("llama",),
            "layer_norm_type": ("rms",),
            "rope": (True,),
            "alibi": (False,),
            "attention_layer_norm": (False,),
            "input_emb_norm": (False,),
            "scale_logits": (False,),
            "multi_query_attention": (None, False),
            "bias_for_layer_norm": (None, False),
            "layer_norm_with_affine": (True,),
            "block_group_size": (1,),
            "rope_scaling": (None,),
        },
        prefix="model.",
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        keys={
            "vocab_size": "vocab_size",
            "dim": "n_embd",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "hidden_dim": "n_inner",
            "max_len": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "tie_embeddings": "tie_word_embeddings",
            **TOKEN_IDS,
        },
        fixed={
            "causal": True,
            "positions": "learned",
            "norm": "layer",
            "norm_bias": True,
            "qk_norm": False,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "gated": False,
        },
        tensors={
            "embed": "transformer.wte",
            "embed_positions": "transformer.wpe",
            "blocks.*.attn_norm": "transformer.h.*.ln_1",
            ("blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v"):
                "transformer.h.*.attn.c_attn ^T",
            "blocks.*.attn.o": "transformer.h.*.attn.c_proj ^T",
            "blocks.*.mlp_norm": "transformer.h.*.ln_2",
            "blocks.*.mlp.up": "transformer.h.*.mlp.c_fc ^T",
            "blocks.*.mlp.down": "transformer.h.*.mlp.c_proj ^T",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
        only={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        unused=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
        prefix="transformer.",
    ),
    "bert": Family(
        architecture="BertForMaskedLM",
        keys={**BERT_KEYS, "head_activation": "hidden_act"},
        fixed=BERT_FIXED,
        tensors={
            **BERT_TENSORS,
            "head_dense": "cls.predictions.transform.dense",
            "head_norm": "cls.predictions.transform.LayerNorm",
            "head.weight": "cls.predictions.decoder.weight",
            "head.bias": "cls.predictions.bias",
        },
        defaults=BERT_DEFAULTS,
        only=BERT_ONLY,
        unused=r"bert\.pooler\..*|cls\.seq_relationship\..*"
               r"|bert\.embeddings\.(position_ids|token_type_ids)",
        prefix="bert.",
        copies={"cls.predictions.decoder.bias": "head.bias"},
    ),
    "roberta": Family(
        architecture="RobertaForMaskedLM",
        keys=BERT_KEYS,
        fixed=BERT_FIXED,
        tensors={
            **ROBERTA_TENSORS,
            "head_dense": "lm_head.dense",
            "head_norm": "lm_head.layer_norm",
            "head.weight": "lm_head.decoder.weight",
            "head.bias": "lm_head.bias",
        },
        defaults={**BERT_DEFAULTS, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0},
        only=BERT_ONLY,
        unused=r"roberta\.pooler\..*|roberta\.embeddings\.(position_ids|token_type_ids)",
        prefix="roberta.",
        copies={"lm_head.decoder.bias": "head.bias"},
        offset=True,
    ),
    "modernbert": Family(
        architecture="ModernBertForMaskedLM",
        keys={
            "vocab_size": "vocab_size",
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "max_len": "max_position_embeddings",
            "norm_eps": "norm_eps",
            "norm_bias": "norm_bias",
            "activation": "hidden_activation",
            **BIAS_KEYS,
            "mlp_bias": "mlp_bias",
            "local_window": "local_attention",
            "global_every": "global_attn_every_n_layers",
            "rope_theta": "global_rope_theta",
            "local_rope_theta": "local_rope_theta",
            "head_transform_bias": "classifier_bias",
            "head_activation": "classifier_activation",
            "head_bias": "decoder_bias",
            "tie_embeddings": "tie_word_embeddings",
            **TOKEN_IDS,
        },
        fixed={"norm": "layer", "embed_norm": True, "first_norm": False, "qk_norm": False,
               "head_transform": True},
        tensors={
            "embed": "model.embeddings.tok_embeddings",
            "embed_norm": "model.embeddings.norm",
            "blocks.*.attn_norm": "model.layers.*.attn_norm",
            ("blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v"): "model.layers.*.attn.Wqkv",
            "blocks.*.attn.o": "model.layers.*.attn.Wo",
            "blocks.*.mlp_norm": "model.layers.*.mlp_norm",
            ("blocks.*.mlp.gate", "blocks.*.mlp.up"): "model.layers.*.mlp.Wi",
            "blocks.*.mlp.down": "model.layers.*.mlp.Wo",
            "norm": "model.final_norm",
            "head_dense": "head.dense",
            "head_norm": "head.norm",
            "head": "decoder",
        },
        defaults={
            "norm_eps": 1e-5,
            "norm_bias": False,
            "hidden_activation": "gelu",
            "attention_bias": False,
            "mlp_bias": False,
            "local_attention": 128,
            "global_attn_every_n_layers": 3,
            "global_rope_theta": 160000.0,
            "local_rope_theta": 10000.0,
            "classifier_bias": False,
            "classifier_activation": "gelu",
            "decoder_bias": True,
            "tie_word_embeddings": True,
        },
        only={**ROPE_ONLY, "rope_scaling": (None,)},
        prefix="model.",
    ),
    "lladamoe": LLADA_MOE,
    "llada2": LLADA2,
    # The same with editing; the published LLaDA2.1 says llada2_moe, too, and is then read as that.
    "llada21": replace(LLADA2, fixed={**LLADA2.fixed, "edit_threshold": 0.9},
                       spellings=("llada21_moe",)),
    "qwen3_moe": QWEN3_MOE,
    "rnd1": replace(QWEN3_MOE, architecture="RND1LM", fixed={"shift": True}),
    "sdar": replace(
        QWEN3,
        architecture="SDARForCausalLM",
        keys={**QWEN3.keys, "block_length": "block_size"},
        fixed=SDAR_FIXED,
        defaults={**QWEN3.defaults, "block_size": 4},
    ),
    "sdar_moe": replace(
        QWEN3_MOE,
        architecture="SDARMoeForCausalLM",
        keys={**QWEN3_MOE.keys, "block_length": "block_size"},
        fixed=SDAR_FIXED,
        defaults={**QWEN3_MOE.defaults, "block_size": 4},
    ),
    "fast_dllm_v2": Family(
        architecture="Fast_dLLM_QwenForCausalLM",
        keys={**LLAMA_KEYS, "block_length": "bd_size"},
        fixed={**PLAIN, "qkv_bias": True, "shift": True, "blocks_from_start": True,
               "threshold": 0.9},
        tensors=LLAMA_TENSORS,
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 32768, "bd_size": 32},
        only=QWEN_ONLY,
        unused=LLAMA_UNUSED,
        prefix="model.",
        spellings=("Fast_dLLM_Qwen",),
    ),
    "illada": Family(
        architecture="ILLaDAForCausalLM",
        keys={**LLAMA_KEYS, **BIAS_KEYS, "mlp_bias": "mlp_bias"},
        fixed=PLAIN,
        tensors=LLAMA_TENSORS,
        defaults=LLAMA_DEFAULTS,
        only=ROPE_ONLY,
        unused=LLAMA_UNUSED,
        prefix="model.",
    ),
}

# --------------------------------------------------------------------------------------------------
# dLLM's Edit Flows (edits.py): three of the families once more, with heads that edit. Its code
# trains with the cubic schedule unless told otherwise, and its config.json does not say.

EDITING = {"llada": "editflow-llada", "Dream": "editflow-dream",
           "modernbert": "editflow-modernbert"}
EDIT_ARCHITECTURES = {"llada": "EditFlowLLaDAModel", "Dream": "EditFlowDreamModel",
                      "modernbert": "EditFlowModernBertModel"}
EDIT_TENSORS = {"substitute_head": "sub_logits", "insert_head": "ins_logits",
                "rate_head": "rate_heads.0"}
for base, name in EDITING.items():
    row = FAMILIES[base]
    FAMILIES[name] = replace(
        row,
        architecture=EDIT_ARCHITECTURES[base],
        fixed={**row.fixed, "edits": True, "keeps_head": True, "edit_schedule": "cubic",
               "edits_before_norm": base == "modernbert", "edit_masks": 128},
        tensors={**row.tensors, **EDIT_TENSORS},
    )
