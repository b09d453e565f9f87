"""What surrounds fine-tuning and is no lesson: mistakes found before hours of work, the base beside
the run, what is written at the end."""
import common
from model import Transformer
from pretrained.export import save
from pretrained.hub import model_folder
from pretrained.tensors import gathered
from pretrained.tiny import tiny_model
from pretrained.vocabulary import resize_vocabulary
from training import nf4
from training.lora import WEIGHTS, holds_a_run, name_of_base, save_adapter
from training.merge import check_target, write_merged

# --------------------------------------------------------------------------------------------------
# Mistakes


def check_settings(settings):
    """ValueError for a constant of finetune_llada.py that cannot be."""
    common.check(
        settings,
        at_least_1=["seq_len", "batch_size", "replicas", "grad_accum", "eval_sequences",
                    "final_eval_sequences"],
        positive=["learning_rate", "epochs"],
        not_negative=["lora_rank", "cap_weight", "weight_decay", "grad_clip", "max_steps",
                      "max_minutes", "eval_interval", "sample_tokens", "ranks", "memory_gb"],
        shares=["warmup"], below_1=["beta2"], finite=["epochs"], padding=["eos", "hidden"],
        block_weights=["mean", "bound"], decay=["linear", "cosine"])
    max_steps, max_minutes = settings["max_steps"], settings["max_minutes"]
    common.note_without_effect(f"max_steps {max_steps}", max_minutes=max_steps == 0)
    common.note_without_effect(f"max_steps {max_steps} and max_minutes {max_minutes}",
                               epochs=not (max_steps or max_minutes))
    base_bits, cart = settings["base_bits"], settings["cart"]
    t_low, t_high = settings["t_low"], settings["t_high"]
    if base_bits not in (4, 16):
        raise ValueError("base_bits must be 16 (the base as dtype says) or 4 (NF4), got "
                         f"{base_bits}")
    if base_bits == 4 and not settings["lora_rank"]:
        raise ValueError("base_bits=4 freezes the base, and lora_rank=0 leaves nothing to learn: "
                         "set lora_rank")
    if not 0 <= cart <= 1:
        raise ValueError(f"cart must be between 0 and 1, got {cart}")
    if not 0 <= t_low < t_high <= 1:
        raise ValueError("t_low and t_high must be times with 0 <= t_low < t_high <= 1, got "
                         f"{t_low} and {t_high}")


def check_replicas(replicas, world_size):
    """ValueError where so many copies of a model do not divide the processes."""
    if world_size % replicas:
        raise ValueError(f"replicas must divide the {world_size} processes, got {replicas}")


def check_processes(settings, world_size):
    """ValueError where the work cannot be spread over so many processes as finetune_llada.py is
    told; FileNotFoundError or the like if a package for 4 bits is missing."""
    check_replicas(settings["replicas"], world_size)
    if settings["base_bits"] == 4:
        nf4.library()
        if settings["fsdp"] and world_size > 1:
            raise ValueError("a 4-bit base is not spread over processes: add --fsdp=False, and "
                             "each has it whole")


def check_folder(folder, out_dir, lora_rank):
    """ValueError if out_dir holds a model where an adapter is to be written, or the reverse."""
    other, kind = "adapter_model.safetensors", "an adapter"
    if lora_rank:
        other, kind = "config.json", "a model"
    if (folder / other).exists():
        raise ValueError(f"{out_dir} holds {kind} of another run, which this one could be mistaken "
                         "for: choose another out_dir")


def check_masks(config, name):
    """ValueError if the model called `name`, with this Config, learned to undo anything but masks,
    be it edits or another noise."""
    if config.edits:
        raise ValueError(f"{name} inserts, deletes and substitutes: see train_edits.py")
    if config.noise != "mask":
        raise ValueError(f"{name} undoes {config.noise} noise: this recipe takes models of masks")


def check_kind(config, name):
    """ValueError if the model called `name`, with this Config, does not fill masks."""
    check_masks(config, name)
    if config.causal:
        raise ValueError(f"{name} is an autoregressive model ({config.family}): see convert_ar.py")


def check_base(config, settings):
    """ValueError if a model with this Config is not to be fine-tuned with these settings of
    finetune_llada.py."""
    name, seq_len = settings["init_from"], settings["seq_len"]
    check_kind(config, name)
    if seq_len > config.max_len:
        raise ValueError(f"{name} has a context of {config.max_len} tokens, seq_len is {seq_len}: "
                         f"take --seq_len={config.max_len}")
    if not config.block_length:
        for setting in ("t_low", "t_high", "complement", "block_weights", "cap_weight"):
            if common.given(setting, None) is not None:
                raise ValueError(f"{setting} is for models that write in blocks, {name} is none")
        return
    if seq_len % config.block_length:
        raise ValueError(f"{name} writes in blocks of {config.block_length} tokens, which do not "
                         f"divide seq_len {seq_len}")
    if settings["cart"] or settings["padding"] != "eos":
        raise ValueError("cart and padding=hidden are for models that see everything; "
                         f"{name} writes in blocks and sees nothing after its own")


# --------------------------------------------------------------------------------------------------
# Checkpoints


def only_merges(settings, folder):
    """True if --merge was all that there was to do: `folder` holds a finished run, and its adapter
    is written into its base now. ValueError if that would overwrite something."""
    merge, out_dir = settings["merge"], settings["out_dir"]
    if not merge:
        return False
    check_target("merge", merge, settings["init_from"], out_dir)
    if settings["resume"] or not holds_a_run(folder):
        return False
    if common.rank_and_size()[0] == 0:
        print(write_merged(out_dir, merge))
    return True


def base_of_run(init_from, folder, tokenizer, seq_len, seed, vocab_size=None, write=True):
    """The folder of the weights that a run begins with: init_from's own, but `folder`/base for a
    tiny model, which is made here, and for one whose vocabulary, vocab_size, lacks tokens of the
    tokenizer. write: False for a resumed run, which has written it. ValueError if an adapter in
    `folder` stands on another base."""
    kind, _, family = init_from.partition(":")
    is_tiny = kind == "tiny"
    if not is_tiny and (vocab_size is None or tokenizer.vocab_size <= vocab_size):
        return model_folder(init_from)
    base = folder / "base"
    if write and common.rank_and_size()[0] == 0:
        if is_tiny:
            model = tiny_model(family or "llada", tokenizer, seq_len, seed)
        else:
            model = Transformer.from_pretrained(init_from)
            new = range(model.config.vocab_size, tokenizer.vocab_size)
            resize_vocabulary(model, tokenizer.vocab_size, new, seed)
            model.source = None             # the tokenizer is written here
        if not stands_on(folder, base, model):
            if is_tiny:
                model.export_pretrained(base)
            else:
                model.save_pretrained(base)
            tokenizer.save_pretrained(base)
    common.barrier()
    return base


def stands_on(folder, base, model):
    """Whether an adapter in `folder` has `model` as its base already. ValueError if it has another
    one, which the new run would take away from it."""
    if not (folder / WEIGHTS).exists() or not (base / "config.json").exists():
        return False
    before, now = Transformer.from_pretrained(base).state_dict(), model.state_dict()
    if before.keys() != now.keys() or any(not before[k].equal(now[k]) for k in now):
        raise ValueError(f"{folder} holds an adapter of a run that began with other weights: "
                         "choose another out_dir")
    return True


def save_result(model, folder, lora_rank, init_from, base):
    """Write the adapter or the model into `folder`, for sample.py and the like; all processes take
    part."""
    tensors = model.state_dict()
    if lora_rank:
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = gathered(tensors)
    if common.rank_and_size()[0] != 0:
        return
    if lora_rank:
        save_adapter(model, folder, name_of_base(init_from, base, folder), tensors)
    else:
        save(model, folder, tensors)
