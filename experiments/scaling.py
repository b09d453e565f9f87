"""What full fine-tuning of LLaDA-8B would ask of many cards: memory, traffic, time; arithmetic on
paper, nothing is measured.

    python experiments/scaling.py                   8, 64 and 512 cards, one copy of the model
    python experiments/scaling.py --replicas=8      a copy a node where there are that many (HSDP)

Memory is `finetune_llada.py --plan`'s. With P parameters, n cards a copy, r copies, a card receives
in a step, as FSDP2 works (parameters in bfloat16, gradients in float32):

    gathers      2 * (n - 1) / n * 2 P bytes       all parameters, forward and backward
    scatter          (n - 1) / n * 4 P bytes       its share of every gradient, summed
    between copies   2 (r - 1) / r * 4 P / n bytes     a ring's sum of the share's gradients

Traffic within a node goes by NVLink, other by the network. It hides behind the products, so that
the larger of the three times is the step's.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402, I001 (before torch: it sets how threads wait)
import torch  # noqa: E402

from model import Config, Transformer  # noqa: E402
from training.flops import flops_per_token  # noqa: E402
from training.log import PEAK_FLOPS  # noqa: E402
from training.memory import LLADA, plan_memory  # noqa: E402

# ---- settings: change them here or with --name=value ---------------------------------------------
seq_len = 4096              # tokens of a sequence
batch_size = 2              # sequences a card and step
replicas = 1                # copies of the model at most, none of fewer than the cards of a node
node = 8                    # cards that NVLink connects
mfu = 0.45                  # share of the peak FLOP/s that the products are taken to reach
card = "H100"               # a key of PEAK_FLOPS in training/log.py
nvlink_gb_s = 450.0         # GB/s that a card receives from its node: half of the 900 both ways
network_gb_s = 50.0         # GB/s that a card receives from other nodes: 400 Gbit/s
settings = common.override(globals(), read=__name__ == "__main__")

CARDS = (8, 64, 512)


@dataclass
class Step:
    """A step of one card."""
    cards: int
    copies: int
    memory_gb: float        # the plan's peak
    nvlink_gb: float        # received from its node
    network_gb: float       # received from other nodes
    products_s: float
    nvlink_s: float
    network_s: float

    @property
    def seconds(self):
        return max(self.products_s, self.nvlink_s, self.network_s)

    @property
    def limit(self):
        """What decides."""
        times = {"products": self.products_s, "NVLink": self.nvlink_s, "network": self.network_s}
        return max(times, key=times.get)


def traffic(parameters, cards, copies, node):
    """(bytes from the own node, bytes from others) that a card receives in a step."""
    n = cards // copies                                 # cards of a copy
    whole = (n - 1) / n * (2 * 2 + 4) * parameters      # two gathers in 2 bytes, a scatter in 4
    sums = 2 * (copies - 1) / copies * 4 * parameters / n
    if n <= node:
        return whole, sums
    near = (node - 1) / (n - 1)                         # of its partners, those in its node
    return whole * near, whole * (1 - near) + sums


def step_of(config, cards, copies):
    """The Step of so many cards."""
    ranks = cards // copies
    with torch.device("meta"):
        model = Transformer(config)
    parameters = sum(p.numel() for p in model.parameters())
    plan = plan_memory(config, seq_len, batch_size, 0, ranks=ranks)
    flops = flops_per_token(model, seq_len, head_share=0.5) * 4 / 3      # checkpointing: once more
    products = flops * batch_size * seq_len / (mfu * PEAK_FLOPS[card])
    near, far = traffic(parameters, cards, copies, node)
    return Step(cards, copies, plan.peak / 1e9, near / 1e9, far / 1e9, products,
                near / 1e9 / nvlink_gb_s, far / 1e9 / network_gb_s)


def copies_of(cards):
    """How many copies there are on so many cards: at most `replicas`, of whole nodes."""
    return math.gcd(replicas, max(1, cards // node))


def table(config):
    """Lines of Markdown."""
    lines = ["| cards | copies | memory, GB | NVLink, GB | network, GB | products, s | NVLink, s | "
             "network, s | tokens/s in all | limit |", "|" + " --- |" * 10]
    for cards in CARDS:
        s = step_of(config, cards, copies_of(cards))
        speed = cards * batch_size * seq_len / s.seconds
        lines.append(f"| {s.cards} | {s.copies} | {s.memory_gb:.1f} | {s.nvlink_gb:.1f} | "
                     f"{s.network_gb:.1f} | {s.products_s:.2f} | {s.nvlink_s:.2f} | "
                     f"{s.network_s:.2f} | {speed:,.0f} | {s.limit} |")
    return lines


if __name__ == "__main__":
    common.check({**settings, "seed": 0}, at_least_1=["seq_len", "batch_size", "replicas", "node"],
                 positive=["mfu", "nvlink_gb_s", "network_gb_s"], card=list(PEAK_FLOPS))
    print("\n".join(table(Config(**LLADA))))
