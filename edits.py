"""Edit Flows: a text is written by inserting, deleting and substituting tokens.

Masks fix the length of what is written; edits do not (Edit Flows, Havasi et al. 2025, arXiv
2506.09018). Every idea stands here in its plain form, as in diffusion.py; sampling/rewriting.py
does the same for many rows at once. Pure functions of tensors: no files, no tokenizers.

Time runs as in that paper, the other way round than in diffusion.py: x_0 at t = 0 is the text to
begin with (nothing, masks, a damaged text), x_1 at t = 1 the finished one. The two are aligned by
putting BLANK into both, so that column i of z_0 turns into column i of z_1 by one edit or none:

    z_0   a  b  -  d        b is substituted by x, c inserted,
    z_1   a  x  c  -        d deleted

Between them each column is that of z_1 with probability kappa_t, else that of z_0 (their eq. 14).
x_t is z_t without the blanks. The model reads x_t and gives every position three rates, of a
substitution, a deletion and an insertion after it, and what to write, Q. Edits that are still to
come happen at the rate kappa'_t / (1 - kappa_t) each, and

    loss = E [ sum of all rates  -  sum over the edits to come of  w(t) log rate(edit) ],
    rate(edit) = w(t) * head * Q(token),        w(t) = kappa'_t / (1 - kappa_t)

(their eq. 23) teaches the model these rates. Its heads give the rates without w(t): one number, of
about 1 for an edit that is certain to come, at all times.

Shapes: B batch, Z columns of an alignment, T positions, V vocabulary, N edits. The model is
anything that has `hidden`, `config` and the heads of a model.Transformer that edits. Randomness
comes from generators on the CPU.

edit_tokens.py has the other way of the field: one head whose words are edits.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import kernels
from common import stream, streams
from diffusion import look_up, sample_t, sample_tokens
from passes import check_tokens, config_of, ratio_error, token_ids

BLANK = -1
# The kinds of edit, in the order of the model's rates.
SUBSTITUTE, DELETE, INSERT = 0, 1, 2

# --------------------------------------------------------------------------------------------------
# Schedules: (kappa_t, kappa'_t). kappa_t is the share of edits that are done at time t.


def linear(t):
    """kappa_t = t."""
    return t, torch.ones_like(t)


def cubic(t, a=1.0, b=1.0):
    """kappa_t = (a + 1) t^3 - (a + b + 1) t^2 + (b + 1) t, dLLM's, with a slope of b + 1 at t = 0
    and of a + 1 at t = 1."""
    kappa = (a + 1) * t**3 - (a + b + 1) * t**2 + (b + 1) * t
    return kappa, 3 * (a + 1) * t**2 - 2 * (a + b + 1) * t + (b + 1)


def cube(t):
    """kappa_t = t^3: most edits come late (Edit Flows, in its experiments). The case a = 0, b = -1
    of `cubic`."""
    return t**3, 3 * t**2


def cosine(t):
    """kappa_t = 1 - cos(pi t / 2)."""
    angle = math.pi / 2 * t
    return 1 - torch.cos(angle), math.pi / 2 * torch.sin(angle)


FLOW_SCHEDULES = {"linear": linear, "cubic": cubic, "cube": cube, "cosine": cosine}


def flow_weight(t, schedule="cubic"):
    """w(t) = kappa'_t / (1 - kappa_t), the rate of an edit that is still to come. 1e-6 keeps it
    finite at t = 1, as in dLLM."""
    kappa, d_kappa = look_up(FLOW_SCHEDULES, schedule, "schedule")(t)
    return d_kappa / (1 - kappa + 1e-6)


# --------------------------------------------------------------------------------------------------
# Align


def align(x_0, x_1, substitution=1, gap=1):
    """(z_0, z_1): the two texts with BLANK put in, lists of equal length, so that the edits from
    one to the other cost least (Needleman and Wunsch 1970): `substitution` for another token, `gap`
    for an insertion or a deletion.

    x_0 and x_1 are lists of token ids, or tensors [T]; an empty one is all gaps. Of several
    cheapest alignments it is the one that, read from the end, prefers a pair before a deletion
    before an insertion, as dLLM has it. Raises ValueError for a negative id or what is no id.
    """
    x_0, x_1 = token_ids(x_0), token_ids(x_1)
    for name, tokens in (("x_0", x_0), ("x_1", x_1)):
        if any(token < 0 for token in tokens):
            raise ValueError(f"{name} holds a negative token id: {BLANK} stands for a gap")
    if substitution == gap == 1 and not kernels.PLAIN:
        return kernels.align_at_unit_cost(x_0, x_1, BLANK)
    table = costs(x_0, x_1, substitution, gap)
    i, j, z_0, z_1 = len(x_0), len(x_1), [], []
    while i or j:
        cost = 0
        if i and j and x_0[i - 1] != x_1[j - 1]:
            cost = substitution
        if i and j and table[i][j] == table[i - 1][j - 1] + cost:
            i, j = i - 1, j - 1
            z_0.append(x_0[i])
            z_1.append(x_1[j])
        elif i and table[i][j] == table[i - 1][j] + gap:
            i = i - 1
            z_0.append(x_0[i])
            z_1.append(BLANK)
        else:
            j = j - 1
            z_0.append(BLANK)
            z_1.append(x_1[j])
    return z_0[::-1], z_1[::-1]


def costs(x_0, x_1, substitution, gap):
    """The table whose entry [i][j] is the smallest cost of turning the first i tokens of x_0 into
    the first j of x_1, lists."""
    table = [[gap * j for j in range(len(x_1) + 1)]]
    for i, token in enumerate(x_0, 1):
        above, row = table[-1], [gap * i]
        for j, other in enumerate(x_1, 1):
            pair = above[j - 1]
            if token != other:
                pair += substitution
            row.append(min(pair, above[j] + gap, row[-1] + gap))
        table.append(row)
    return table


def align_answer(x_0, x_1, prompt_len):
    """`align` of two texts that begin with the same prompt_len tokens, of which none is edited; in
    the cheapest alignment of the whole one might be. Raises ValueError where they differ."""
    x_0, x_1 = token_ids(x_0), token_ids(x_1)
    prompt = x_1[:prompt_len]
    if x_0[:prompt_len] != prompt or len(prompt) < prompt_len:
        raise ValueError(f"the first {prompt_len} tokens of x_0 and x_1 differ: a prompt is given "
                         "and never edited")
    z_0, z_1 = align(x_0[prompt_len:], x_1[prompt_len:])
    return prompt + z_0, prompt + z_1


def stack(alignments):
    """(z_0, z_1), int64 [B, Z] each, of a list of alignments. Shorter ones are filled with columns
    that are blank on both sides, which mean nothing."""
    Z = max(len(z_0) for z_0, _ in alignments)
    both = torch.full((2, len(alignments), Z), BLANK)
    for b, pair in enumerate(alignments):
        for side, z in enumerate(pair):
            both[side, b, :len(z)] = torch.tensor(z, dtype=torch.int64)
    return both[0], both[1]


def blend(z_0, z_1, t, u, schedule="cubic"):
    """z_t: each column that of z_1 where u < kappa_t, else that of z_0. z_0, z_1 int64 [B, Z], t
    float [B, 1], u uniform numbers [B, Z]."""
    kappa, _ = look_up(FLOW_SCHEDULES, schedule, "schedule")(t)
    return torch.where(u < kappa, z_1, z_0)


def without_blanks(z):
    """(x int64 [B, T], shown bool [B, T]): the tokens of z [B, Z] moved together to the left, T of
    the longest row; 0 where a shorter one has ended."""
    present = z != BLANK
    order = (~present).int().argsort(dim=1, stable=True)
    T = max(int(present.sum(1).max()), 1)
    shown = torch.arange(T, device=z.device) < present.sum(1, keepdim=True)             # [B, T]
    return torch.where(shown, z.gather(1, order)[:, :T], 0), shown


@dataclass
class Edits:
    """What turns x_t into x_1, int64 [N] each."""
    kind: torch.Tensor          # SUBSTITUTE, DELETE or INSERT
    row: torch.Tensor           # of the batch
    position: torch.Tensor      # in x_t: of the token that is changed, or after which one comes
    token: torch.Tensor         # that is written; BLANK for a deletion

    def of(self, kind):
        """The edits of one kind."""
        where = self.kind == kind
        return Edits(self.kind[where], self.row[where], self.position[where], self.token[where])


def remaining_edits(z_t, z_1):
    """The Edits that are still to come, one for each column in which z_t and z_1 [B, Z] differ, in
    the order of rows and columns.

    Behind which token an insertion comes is the number of tokens to its left, less one; at the
    very beginning it is after token 0, as dLLM has it: begin texts with a token that stays.
    """
    after = ((z_t != BLANK).cumsum(1) - 1).clamp(min=0)                                # [B, Z]
    row, column = (z_t != z_1).nonzero(as_tuple=True)                                   # [N]
    old, new = z_t[row, column], z_1[row, column]
    kind = torch.full_like(row, SUBSTITUTE)
    kind[new == BLANK] = DELETE
    kind[old == BLANK] = INSERT
    return Edits(kind, row, after[row, column], new)


# --------------------------------------------------------------------------------------------------
# What the heads say


def edit_forward(model, tokens, attention_mask=None, t=None):
    """(substitution logits [B, T, V], insertion logits [B, T, V], rates [B, T, 3]) of a model that
    edits; attention_mask bool [B, T], t float [B]."""
    states = model.hidden(tokens, attention_mask, t=t)                                  # [B, T, D]
    substitutes = edit_logits(model, states, SUBSTITUTE)
    if config_of(model).shift:
        substitutes = one_later(substitutes)
    return substitutes, edit_logits(model, states, INSERT), edit_rates(model, states)


def edit_rates(model, states):
    """Rates [B, T, 3], float32 at least, of states [B, T, D]: to substitute and delete token i, to
    insert after it. With `shift` those of a token are read one position earlier, but what comes
    after it at its own."""
    rates = model.rate_head(states)
    rates = F.softplus(rates.to(torch.promote_types(rates.dtype, torch.float32)))
    if not config_of(model).shift:
        return rates
    return torch.cat((one_later(rates[..., :2]), rates[..., 2:]), dim=-1)


def edit_logits(model, states, kind):
    """Logits [..., V], float32 at least, of states [..., D]: what is written in the place of a
    token (SUBSTITUTE) or after it (INSERT)."""
    if kind == INSERT:
        head = model.insert_head
    elif model.substitute_head is None:
        head = model.head
    else:
        head = model.substitute_head
    logits = head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def edit_nll(model, states, kind, rows, targets):
    """-log p in nats [N], with its gradient, of the tokens `targets` [N] that are written at the
    flat rows int64 [N] of states [B, T, D]."""
    if config_of(model).shift and kind == SUBSTITUTE:
        rows = rows - 1
    logits = edit_logits(model, states.flatten(0, 1)[rows], kind)                       # [N, V]
    return F.cross_entropy(logits, targets, reduction="none")


def one_later(x):
    """x [B, T, ...] shifted by one position; zeros at the first."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


# --------------------------------------------------------------------------------------------------
# Loss


@dataclass
class EditLoss:
    loss: torch.Tensor          # scalar with gradient
    token_nll: torch.Tensor     # [B], detached: the bound of each row, nats
    count: int                  # tokens of the finished texts
    survival: torch.Tensor      # [B]: sum of the heads' rates over the positions
    positive: torch.Tensor      # [B]: sum over the edits to come of -log(rate * Q(token))
    weight: torch.Tensor        # [B]: w(t), clipped
    lengths: torch.Tensor       # [B]: tokens of each finished text

    @property
    def nelbo(self):
        """The bound on -log p(x_1 | x_0), nats per token."""
        return self.token_nll.sum() / self.count


def edit_loss(model, z_0, z_1, t=None, u=None, schedule=None, max_weight=None, per_token=False,
              generator=None):
    """The loss of Edit Flows (2506.09018, eq. 23) for alignments z_0, z_1, int64 [B, Z].

        loss = 1/B sum over rows of  w(t) (survival + positive)
        survival = sum over positions of all three rates of the heads
        positive = sum over the edits to come of  -log head - log Q(token)

    which is eq. 23 but for a term without gradient, -w log w for each edit to come.
    t           float [B] in [0, 1); None: drawn, evenly spread, up to 1 - 1e-3.
    u           uniform numbers [B, Z]; None: drawn.
    schedule    None: the one of the model's config.
    max_weight  clips w(t) of `loss`, not of `nelbo`; None or 0: no clipping.
    per_token   divide a row by the length of its x_1, as dLLM does unless told otherwise. Long
                texts then count as much as short ones, which is another objective than the paper's.
    Raises ValueError where shapes do not fit, a row has nothing to insert after, or the model has
    no edit heads.
    """
    check_editor(model)
    B, Z = z_0.shape
    if z_1.shape != z_0.shape:
        raise ValueError(f"z_0 and z_1 must have one shape, got {list(z_0.shape)} and "
                         f"{list(z_1.shape)}")
    if t is None:
        t = 1 - sample_t((B,), generator)
    if u is None:
        u = torch.rand((B, Z), generator=generator)
    if t.shape != (B,) or u.shape != (B, Z):
        raise ValueError(f"t and u must have shapes {[B]} and {[B, Z]}, got {list(t.shape)} and "
                         f"{list(u.shape)}")
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"t must be between 0 and 1, got {t.min().item()} to {t.max().item()}")
    schedule = schedule or config_of(model).edit_schedule
    t, u = t.to(z_0.device)[:, None], u.to(z_0.device)                                  # [B, 1]
    z_t = blend(z_0, z_1, t, u, schedule)
    if not (z_t != BLANK).any(1).all():
        raise ValueError("a text to edit is empty: put a token in front that stays, such as the "
                         "beginning of text, so that something can be inserted after it")
    x_t, shown = without_blanks(z_t)
    edits = remaining_edits(z_t, z_1)
    survival, minus_log = edit_terms(model, x_t, shown, t[:, 0], edits)                 # [B], [N]
    positive = sum_by_row(minus_log, edits.row, B)
    weight = flow_weight(t[:, 0], schedule)
    clipped = weight.clamp(max=max_weight or math.inf)
    lengths = (z_1 != BLANK).sum(1)
    divisor = lengths.clamp(min=1) if per_token else 1
    loss = (clipped * (survival + positive) / divisor).mean()
    rows = weight * (survival + positive - counted(edits, B)).detach()
    return EditLoss(loss, rows, int(lengths.sum()), survival, positive, clipped, lengths)


def edit_terms(model, x_t, shown, t, edits):
    """(survival [B], -log(rate * Q(token)) of each edit [N]) of a pass over x_t [B, T], whose
    padding is where `shown` is false; t [B]."""
    states = model.hidden(x_t, shown if not shown.all() else None, t=t)                 # [B, T, D]
    rates = edit_rates(model, states)                                                   # [B, T, 3]
    survival = (rates.sum(-1) * shown).sum(1)
    rate = rates[edits.row, edits.position, edits.kind]                                 # [N]
    first = (edits.position == 0) & (edits.kind != INSERT)
    if config_of(model).shift and first.any():
        raise ValueError("this model reads position i - 1 for token i and cannot change the first "
                         "token: begin both texts with the same one")
    nll = torch.zeros_like(rate)
    for kind in (SUBSTITUTE, INSERT):
        where = (edits.kind == kind).nonzero()[:, 0]
        rows = edits.row[where] * x_t.shape[1] + edits.position[where]
        nll = nll.index_add(0, where, edit_nll(model, states, kind, rows, edits.token[where]))
    return survival, nll - rate.log()


def sum_by_row(values, row, B):
    """Sums [B] of values [N] that belong to rows [N]."""
    return torch.zeros(B, dtype=values.dtype, device=values.device).index_add(0, row, values)


def counted(edits, B):
    """What turns `survival + positive` into the bound, [B]: for each different edit n - n log n,
    where n columns of the row ask for it.

    The process that is imitated makes an edit that n columns ask for at the rate n w(t). The
    integral over t of the divergence between its rates and the model's,

        sum of the model's rates  +  sum over edits of  n w (log(n w / rate) - 1),

    bounds -log p(x_1 | x_0) of the model (for jump processes: Campbell et al. 2022, 2205.14987,
    proposition 2). It is not tight where x_t does not tell which columns are done, as in a run of
    equal tokens.
    """
    keys = torch.stack((edits.row, edits.kind, edits.position, edits.token), dim=1)     # [N, 4]
    different, n = keys.unique(dim=0, return_counts=True)
    n = n.float()
    return sum_by_row(n - n * n.log(), different[:, 0], B)


def check_editor(model):
    """ValueError for a model without edit heads."""
    if not config_of(model).edits:
        raise ValueError("this model has no edit heads: train_edits.py --init_from=... gives it "
                         "some")


@torch.no_grad()
def edit_nelbo(model, z_0, z_1, num_samples=1, seed=0, run_passes=map):
    """(bound on -log p(x_1 | x_0) in nats per token of x_1, its standard error) for alignments z_0,
    z_1 [N, Z]: `counted` at num_samples times a row, together evenly spread over [0, 1 - 1e-3).

    run_passes  the builtin map, or common.share, which divides the passes among processes.
    """
    N, Z = z_0.shape
    batch_size = 32                                     # rows of a pass
    device = next(model.parameters()).device
    generator = stream("times of edit_nelbo", seed)
    t = 1 - sample_t((N, num_samples), generator)
    u = torch.rand((num_samples, N, Z), generator=generator)
    passes = []                                         # (sample, rows) each
    for sample in range(num_samples):
        for begin in range(0, N, batch_size):
            passes.append((sample, slice(begin, begin + batch_size)))

    def bound(one):                                     # nats [B]
        sample, rows = one
        found = edit_loss(model, z_0[rows].to(device), z_1[rows].to(device), t[rows, sample],
                          u[sample, rows])
        return found.token_nll.double().cpu()

    nats = torch.zeros(N, num_samples, dtype=torch.float64)
    for (sample, rows), found in zip(passes, run_passes(bound, passes)):
        nats[rows, sample] = found
    lengths = (z_1 != BLANK).sum(1).double()
    value = nats.sum() / (lengths.sum() * num_samples)
    return value.item(), ratio_error(nats, lengths, value)


# --------------------------------------------------------------------------------------------------
# Edit


@dataclass
class Fires:
    """What happens at each position of a row in one step, lists of T bool."""
    delete: list
    substitute: list
    insert: list

    def __bool__(self):
        return any(self.delete) or any(self.substitute) or any(self.insert)


def fires(rates, weight, tau, u, frozen, closed):
    """The Fires of one row: an edit of rate r happens in a step of length tau with probability
    r tau, a first-order step of the process (Edit Flows, section 3; dLLM).

    rates [T, 3] of the heads; weight w(t); u uniform numbers [3, T]: whether a token is changed at
    all, whether that is a deletion, whether something is inserted after it. frozen, closed bool
    [T]: tokens that stay, and after which nothing comes. Raises FloatingPointError for rates that
    are not finite.
    """
    if not rates.isfinite().all():
        raise FloatingPointError("the model's rates overflow: it was trained with too high a "
                                 "learning rate, or its weights are damaged")
    substitute, delete, insert = (rates * weight).unbind(-1)                            # [T]
    substitute, delete = substitute * ~frozen, delete * ~frozen
    insert = insert * ~closed
    changes = u[0] < ((substitute + delete) * tau).clamp(0, 1 - 1e-6)
    is_deletion = u[1] < delete / (substitute + delete + 1e-8)
    inserts = u[2] < (insert * tau).clamp(0, 1 - 1e-6)
    return Fires((changes & is_deletion).tolist(), (changes & ~is_deletion).tolist(),
                 inserts.tolist())


@dataclass
class Written:
    """A row after a step."""
    tokens: list                # its tokens
    origin: list                # for each: the position it had, None: it was inserted
    edited: list                # for each: whether this step wrote it


def apply_edits(tokens, fire, substitutes, inserts):
    """The row that Fires make of `tokens`, as Written. substitutes, inserts: lists of the token
    that would be written at, or after, each position."""
    new = Written([], [], [])
    for i, token in enumerate(tokens):
        if not fire.delete[i]:
            new.tokens.append(substitutes[i] if fire.substitute[i] else token)
            new.origin.append(i)
            new.edited.append(fire.substitute[i])
        if fire.insert[i]:                              # after a deleted token as well
            new.tokens.append(inserts[i])
            new.origin.append(None)
            new.edited.append(True)
    return new


def carried(flags, origin):
    """bool [T] flags of the positions before a step, as those after it have them; what was inserted
    has none."""
    flags = flags.tolist()
    return torch.tensor([i is not None and flags[i] for i in origin], dtype=torch.bool)


def protect(length, prompt_len):
    """(frozen, closed), bool [length] each: the first prompt_len tokens stay as they are, and
    nothing comes between them, but after the last of them."""
    position = torch.arange(length)
    return position < prompt_len, position < prompt_len - 1


def flow_times(tau):
    """The times at which steps of length tau begin: 0, tau, 2 tau... below 1 - 1e-3. Raises
    ValueError for a length that is not above 0."""
    if not tau > 0:
        raise ValueError(f"tau, the length of a step in time, must be above 0, got {tau}")
    t, times = 0.0, []
    while len(times) < math.ceil(1 / tau) and t < 1 - 1e-3:
        times.append(t)
        t += tau
    return times


@torch.no_grad()
def flow(model, tokens, tau, schedule=None, prompt_len=0, frozen=None, closed=None,
         temperature=0.0, seed=None, uniform=None, on_step=None):
    """The plain sampler: edit a row of tokens, a list, from t = 0 to 1. Returns a list.

    Each step of length tau asks the model for rates, lets edits happen with probability
    rate * w(t) * tau, and writes them all at once. sampling/rewriting.py does the same with many
    rows.
    schedule    of w(t); None: the one that the model was trained with. dLLM samples with "linear",
                whatever was trained.
    frozen, closed  bool [T]: tokens that stay, and after which nothing comes; None: what `protect`
                says of a prompt of prompt_len tokens.
    temperature 0: the most probable token; else a sample of softmax(logits / temperature).
    seed        of the stream (seed, 0), as row 0 of rewriting.py has it.
    uniform     uniform(step, length) -> [3, length] in place of the stream; for comparisons.
    on_step     called with (step, Written) after each step.
    Raises ValueError for an empty row, a token outside the vocabulary, a canvas that outgrows the
    context, a model without heads, a tau or a temperature that cannot be.
    """
    check_editor(model)
    tokens = token_ids(tokens)
    check_tokens(config_of(model), [tokens])
    if not tokens:
        raise ValueError("there is nothing to edit: a row needs at least one token")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    stays, shuts = protect(len(tokens), prompt_len)
    frozen = stays if frozen is None else frozen
    closed = shuts if closed is None else closed
    config, generator = config_of(model), streams(seed, 1)[0]
    device = next(model.parameters()).device
    for step, t in enumerate(flow_times(tau)):
        x, time = torch.tensor([tokens], device=device), torch.tensor([t])
        substitutes, inserts, rates = edit_forward(model, x, None, time.to(device))
        weight = flow_weight(time, schedule or config.edit_schedule)
        u = draw(generator, len(tokens), temperature)                                   # [3 or 5,T]
        if uniform is not None:
            u[:3] = uniform(step, len(tokens))
        fire = fires(rates[0].cpu(), weight, tau, u, frozen, closed)
        written = sample_tokens(substitutes[0].cpu(), temperature, u[-2].double()).tolist()
        inserted = sample_tokens(inserts[0].cpu(), temperature, u[-1].double()).tolist()
        new = apply_edits(tokens, fire, written, inserted)
        if len(new.tokens) > config.max_len:
            raise ValueError(outgrown(len(new.tokens), config.max_len))
        tokens = new.tokens
        frozen, closed = carried(frozen, new.origin), carried(closed, new.origin)
        if on_step is not None:
            on_step(step, new)
        if not tokens:                                  # everything was deleted
            break
    return tokens


def draw(generator, length, temperature):
    """Uniform numbers of a step of one row, [3, length]; at a temperature [5, length], the last two
    of which choose the tokens."""
    return torch.rand(5 if temperature > 0 else 3, length, generator=generator)


def outgrown(length, max_len):
    """What is said of a canvas that has become too long."""
    return (f"the text has grown to {length} tokens, past the model's context of {max_len}: it "
            "stops there")
