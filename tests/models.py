"""Small models and rows of tokens for the tests of diffusion.py, sampling/ and evaluation/: random
models far from uniform, and models whose distribution is known."""
import itertools

import torch
import torch.nn.functional as F

from model import Config, Transformer
from sampling.engine import infill

MASK = 11


def tiny(seed=0, **options):
    """A small random model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=12, dim=16, n_layers=2, n_heads=2, max_len=64, mask_token_id=MASK,
                    eos_token_id=None)
    model = Transformer(Config(**settings | options)).init_weights(seed)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def tokens_of(shape, seed=0, vocab=11):
    """Random tokens, none of them the mask."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def never_mask(model):
    """A trained model never predicts the mask token; make a random one like that."""
    with torch.no_grad():
        model.head.weight[MASK] = 0
        model.norm.weight.fill_(1)
    forward = model.forward

    def masked(*args, **kwargs):
        out = forward(*args, **kwargs)
        if kwargs.get("targets") is None:
            out[..., MASK] = -1e9
        return out

    model.forward = masked
    return model


RAGGED = [[1, 2, 3, 4, 5, 6, 7], [], [8, 9], [3, 1, 4, 1, 5, 9, 2, 6, 5]]


def ragged_sequences(seed, rows=4, longest=9):
    """Rows of 1 to `longest` tokens; the first is the longest and the second the shortest."""
    lengths = torch.randint(
        1, longest + 1, (rows,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    lengths[:2] = longest, 1
    return [
        tokens_of((length,), seed=100 * seed + row).tolist() for row, length in enumerate(lengths)
    ]


# --------------------------------------------------------------------------------------------------
# Models whose distribution is known


class ExactPosterior(torch.nn.Module):
    """The true p(x_i | visible tokens) of a joint distribution over V^T, as a model with logits and
    `select`."""

    def __init__(self, T=3, V=3, seed=0):
        super().__init__()
        self.config = Config(vocab_size=V + 1, dim=2, n_layers=1, n_heads=1, mask_token_id=V)
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.joint = (
            torch.rand((V,) * T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            ** 3
        )
        self.joint /= self.joint.sum()

    def forward(self, tokens, attention_mask=None, select=None):
        V, T = self.joint.shape[0], self.joint.dim()
        states = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [V^T, T]
        fits = ((tokens[:, None] == states) | (tokens[:, None] == V)).all(-1)  # [B, V^T]
        p = fits * self.joint.flatten()
        marginal = torch.stack(
            [(p[:, None] * (states[:, i] == torch.arange(V)[:, None])).sum(-1) for i in range(T)],
            dim=1,
        )  # [B, T, V]
        logits = F.pad(marginal.log(), (0, 1), value=-torch.inf) + self.anchor
        return logits if select is None else logits[select]

    def entropy(self):
        return -(self.joint * self.joint.log()).sum().item()

    def sample(self, n, seed):
        flat = torch.multinomial(
            self.joint.flatten(), n, replacement=True, generator=torch.Generator().manual_seed(seed)
        )
        states = torch.tensor(
            list(itertools.product(range(self.joint.shape[0]), repeat=self.joint.dim()))
        )
        return states[flat]


class Independent(torch.nn.Module):
    """A model that predicts p [T, V] at each position, whatever it sees."""

    def __init__(self, p, mask_id=None, **config):
        super().__init__()
        self.config = Config(
            vocab_size=p.shape[1],
            dim=2,
            n_layers=1,
            n_heads=1,
            mask_token_id=p.shape[1] - 1 if mask_id is None else mask_id,
            **config,
        )
        self.logits = torch.nn.Parameter(p.log(), requires_grad=False)

    def forward(self, tokens, attention_mask=None, select=None):
        logits = self.logits.expand(*tokens.shape, -1)
        return logits if select is None else logits[select]


def probabilities(T, V, seed=0):
    """Random distributions [T, V] in which the last token, the mask, never comes."""
    p = torch.rand(T, V, generator=torch.Generator().manual_seed(seed)) ** 2
    p[:, -1] = 0
    return p / p.sum(-1, keepdim=True)


# --------------------------------------------------------------------------------------------------
# Counting what they write


def steps_of(model, n, **options):
    """Every Step of filling n masks, one a step."""
    seen = []
    infill(model, [[model.config.mask_token_id] * n], n, on_step=seen.append, **options)
    return seen


def counted(rows, T, V):
    """How often each token stands at each position, [T, V], float64."""
    return torch.stack(
        [torch.tensor([row[i] for row in rows]).bincount(minlength=V) for i in range(T)]
    ).double()


def differs(counts, p):
    """The largest deviation of counts from a multinomial with probabilities p, in standard
    deviations."""
    n = counts.sum(-1, keepdim=True)
    return ((counts - n * p).abs() / (n * p * (1 - p)).sqrt().clamp(min=1e-9)).max().item()
