"""What a model says on the way."""
import torch

from diffusion import denoise
from passes import config_of


def show_answer(run, data, chat, temperature):
    """Say the answer to a held-out question, or a text out of nothing, as far as the model of a Run
    has come. A sharded model needs all processes for it.

    temperature  0: the surest token first; else tokens are drawn, in random order.
    """
    model, text, settings = run.model, run.tokenizer, run.settings
    prompt = data.prompt("val", run.step)[0] if chat else []
    n = min(settings["sample_tokens"], settings["seq_len"] - len(prompt))
    canvas = torch.tensor([prompt + [config_of(model).mask_token_id] * n]).to(run.device)
    remasking = "random" if temperature else "low_confidence"
    model.eval()                            # no dropout
    ids = denoise(model, canvas, n, temperature, remasking, prompt_len=len(prompt), seed=run.step)
    model.train()
    answer = text.decode_answer(ids[0, len(prompt):].tolist())
    question = f"{text.decode(prompt, skip_special_tokens=True)!r} -> " if chat else ""
    run.say(f"step {run.step}: {question}{answer!r}")
