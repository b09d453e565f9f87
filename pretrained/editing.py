"""A model of masks becomes one that edits (edits.py)."""
import torch

from pretrained.families import EDIT_ARCHITECTURES, EDITING, FAMILIES
from pretrained.vocabulary import resize_vocabulary


@torch.no_grad()
def become_editor(model, schedule, time_features=0, num_masks=0, seed=0):
    """Give a Transformer edit heads; what the heads write begins as what its own head predicts, and
    all rates are about 0.1. Returns the model.

    LLaDA, Dream and ModernBERT become the families of dLLM's Edit Flows, whose layout
    export_pretrained then writes; others stay what they are and are written in ours. A model that
    edits already keeps its heads, and begins with num_masks masks from now on. Raises ValueError
    for a model that reads from left to right.
    """
    config = model.config
    refuse_noise(config)
    if config.causal or config.block_length:
        kind = "from left to right" if config.causal else "block by block"
        raise ValueError(f"a {config.family} model that reads {kind} cannot edit: convert it to "
                         "one that sees the whole text first (convert_ar.py)")
    if config.edits:
        check_same(config, schedule, time_features)
        config.edit_masks = num_masks
        return model
    config.edits, config.edit_schedule = True, schedule
    config.edit_masks, config.time_features = num_masks, time_features
    if config.family in EDITING:
        rename_family(config)
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    model.make_edit_heads()
    old = model.head
    for head in (model.substitute_head, model.insert_head):
        if head is not None:
            head.weight.copy_(old.weight)
            if head.bias is not None:
                head.bias.copy_(old.bias)
    generator = torch.Generator().manual_seed(seed)
    model.rate_head.weight.normal_(std=0.02, generator=generator)
    model.rate_head.bias.fill_(-2.25)                   # softplus(-2.25) = 0.1
    if time_features:
        model.make_time_embedding()
        model.embed_time.weight.zero_()                 # told the time, it begins as it was
    return model.to(device, dtype)


def refuse_noise(config):
    """ValueError for a model of other noise than masks."""
    if config.noise != "mask":
        raise ValueError(f"this model undoes {config.noise} noise (train_scratch.py): take a model "
                         "of masks")


def check_same(config, schedule, time_features):
    """ValueError where a model that edits was trained in another way than is asked for now."""
    if config.edit_schedule != schedule or config.time_features != time_features:
        raise ValueError(f"this model was trained to edit with schedule {config.edit_schedule} and "
                         f"time_features {config.time_features}: go on with "
                         f"--schedule={config.edit_schedule} "
                         f"--time_features={config.time_features}")


def rename_family(config):
    """Make a Config one of dLLM's families of edit flows."""
    base = config.family
    config.family, config.keeps_head = EDITING[base], True
    config.edits_before_norm = FAMILIES[config.family].fixed["edits_before_norm"]
    config.published = dict(config.published or {}, model_type=config.family,
                            architectures=[EDIT_ARCHITECTURES[base]])


@torch.no_grad()
def become_corrector(model, block, edit_threshold, has_orders=True):
    """Let a Transformer of masks edit by tokens, in blocks of so many: LLaDA2.1's way, or with two
    more tokens in the vocabulary LLaDA2.2's. They begin as the mask token is. A model that has them
    keeps them. Returns the model; raises ValueError for one that cannot."""
    config = model.config
    refuse_noise(config)
    if config.causal or config.block_length or config.edits:
        raise ValueError(f"this {config.family} model does not see and fill a whole text: take a "
                         "model of masks (convert_ar.py makes one)")
    if config.delete_token_id is not None and not has_orders:
        raise ValueError("this model deletes and inserts: go on with --editing=tokens")
    if block > config.max_len:
        raise ValueError(f"this model has a context of {config.max_len} tokens: take "
                         f"--seq_len={config.max_len}")
    config.edit_threshold, config.edit_masks = edit_threshold, block - 1
    if has_orders and config.delete_token_id is None:
        V, mask = config.vocab_size, config.mask_token_id
        resize_vocabulary(model, V + 2)
        for weight in (model.embed.weight, model.head.weight, model.head.bias):
            if weight is not None:
                weight[V:] = weight[mask]
        config.delete_token_id, config.insert_token_id = V, V + 1
    return model
