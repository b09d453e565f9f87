"""Generate and infill: what diffusion.denoise does, for many prompts at once, with caches and more
rules.

The rows of a batch differ in length and advance independently: each gets, token for token, what it
would get alone. `Sampling` is how to sample, `Engine` the loop, `Row` where a row stands, `Passes`
and `CachedPasses` what the model is fed. Read `denoise` first: it is all of this but batch, caches
and the further rules, and tests hold the two equal.

Shapes: B rows, A of them with a step to do, T positions of the canvas, N predictions, V vocabulary.
"""
import math
import warnings
from dataclasses import dataclass, replace

import torch

import kernels
from common import streams
from diffusion import BLIND, REMASKING, STEP_SCHEDULES, entropy, low_confidence
from model import Transformer
from noises import draw_uniform
from passes import (
    canvas_mask_id,
    check_tokens,
    config_of,
    guided,
    mask_token_id,
    own_block_length,
    row_logits,
)
from sampling.cache import Cache
from sampling.rules import (
    REMASK_SCHEDULES,
    filter_logits,
    keep_best,
    keep_confident,
    keep_entropy_bound,
    keep_factor,
    perturb,
    reverse_step,
)

# The rules by which the predictions decide how many of them a step keeps: fields of Sampling.
ADAPTIVE = ("threshold", "factor", "entropy_bound")


def generate(model, prompts, max_new_tokens=128, steps=128, block_length=None, temperature=0.0,
             remasking="low_confidence", threshold=None, factor=None, cache=None, cfg_scale=0.0,
             schedule=None, seed=None, on_step=None, **more):
    """Continue each prompt by max_new_tokens: list of token lists -> list of token lists, prompt
    and completion.

    Blocks of block_length (None: 32, or all if those are fewer) are denoised from left to right, in
    `steps` steps over all blocks together (LLaDA, section 2.4 and appendix B.4). Prompts may differ
    in length; each gets what it would get alone. An empty prompt generates unconditionally. What
    the arguments mean and which `more` there are: `Sampling`.

    A block-diffusion model uses its own block_length, blocks counted from the end of the prompt.
    LLaDA2 takes any (None: its own), counted from position 0, so that its first block may begin
    with the end of the prompt; the last one is denoised to its end, and the answer cut. Both
    stop after the block that holds an end of text; an autoregressive model, which decodes token by
    token with an exact cache, after the end of text itself.
    Raises ValueError for arguments that cannot be, naming them.
    """
    config, prompts = config_of(model), list(prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    block_length = own_block_length(config, block_length)
    if block_length is None:
        block_length = min(32, max_new_tokens)
    in_blocks = config.causal or config.block_length
    if block_length < 1 or block_length > max_new_tokens and not in_blocks:
        raise ValueError(f"block_length must be between 1 and max_new_tokens = {max_new_tokens}, "
                         f"got {block_length}")
    mask_id = canvas_mask_id(model)
    for i, prompt in enumerate(prompts):
        if mask_id in list(prompt):
            raise ValueError(f"prompt {i} contains the mask token at position "
                             f"{list(prompt).index(mask_id)}: use infill to fill it")
    how = Sampling(
        steps=steps, block_length=block_length, temperature=temperature, remasking=remasking,
        threshold=threshold, factor=factor, cache=cache, cfg_scale=cfg_scale, schedule=schedule,
        seed=seed, on_step=on_step, **more)
    begins = [list(prompt) for prompt in prompts]
    if config.causal:                                  # something must stand before the first token
        begins = [begin or [first_token(config)] for begin in begins]
    canvases = [begin + [mask_id] * max_new_tokens for begin in begins]
    engine = Engine(model, canvases, [len(begin) for begin in begins], how, stop_early=True)
    answers = []
    for prompt, begin, answer in zip(prompts, begins, engine.run()):
        answers.append(answer[len(begin) - len(prompt):])
    return answers


def infill(model, sequences, steps=128, block_length=None, **more):
    """Fill every mask token of each sequence, wherever it stands; `more` arguments as in
    `generate`.

    Blocks are counted from a sequence's start; block_length None: one block. Raises ValueError for
    a sequence without a mask token.
    """
    config, sequences = config_of(model), list(sequences)
    if config.causal:
        raise ValueError("an autoregressive model cannot fill in the middle: it sees nothing right "
                         "of a gap")
    for i, sequence in enumerate(sequences):
        if mask_token_id(model) not in list(sequence):
            raise ValueError(f"sequence {i} has no mask token: there is nothing to fill")
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")
    longest = max(map(len, sequences), default=1)
    block_length = min(own_block_length(config, block_length) or longest, longest)
    how = Sampling(steps=steps, block_length=block_length, **more)
    return Engine(model, sequences, [0] * len(sequences), how).run()


def first_token(config):
    """What an autoregressive model begins an empty text with. Raises ValueError."""
    for token in (config.bos_token_id, config.eos_token_id):
        if token is not None:
            return token
    raise ValueError("an autoregressive model without a bos or eos token cannot start from an "
                     "empty prompt")


# --------------------------------------------------------------------------------------------------
# How to sample


@dataclass(kw_only=True)
class Sampling:
    """How to sample: the keyword arguments of `generate` and `infill`."""
    steps: int                  # denoising steps, over all blocks together
    block_length: int           # tokens denoised together
    temperature: float = 0.0    # 0: the most probable token; else softmax(logits / temperature)
    remasking: str = "low_confidence"   # which predictions a step keeps: a key of REMASKING
    threshold: float = None     # keep all with at least this score; None: the model's own
    minimum: int = None         # with it, so many a step at least; 0: as many as the schedule says.
    #                             None: 1, and `steps` counts no more; LLaDA2: 0
    edit_threshold: float = None    # write a token anew where another is predicted with more than
    #                             this (diffusion.rewrites); None: the model's own, with a threshold
    edit_passes: int = 16       # so often at most when the masks of a block are gone
    factor: float = None        # Fast-dLLM's rule in place of a number a step: keep_factor
    entropy_bound: float = None     # EB-Sampler's rule in place of a number: keep_entropy_bound
    cache: str = None           # "prefix", "dual" (Fast-dLLM: approximate), "block" (exact)
    cfg_scale: float = 0.0      # of passes.guided; 0: none
    schedule: str = None        # tokens a step, a key of STEP_SCHEDULES; None: the model's own
    seed: int = None            # row r draws from the stream (seed, r); a list: from (seed[r], 0),
    #                             what it draws alone; None: another one each time
    on_step: callable = None    # called with a `Step` after each denoising step
    top_p: float = None         # draw from the most probable tokens only, see filter_logits;
    top_k: int = None           # confidence is then read from what is left
    alg_temp: float = None      # draw the positions to keep, see perturb (Dream)
    remask: float = 0.0         # eta > 0, with "ancestral": what was written in the block may be
    remask_schedule: str = "cap"    # masked again (ReMDM); a key of REMASK_SCHEDULES
    suppress: list = ()         # tokens that are never written (LLaDA, B.4: logits_eos_inf)
    defer: list = ()            # tokens that are written last (LLaDA, B.4: confidence_eos_eot_inf)

    def __post_init__(self):
        if 0 < self.temperature < 1e-6:     # 0 in all that float32 can tell, and does not overflow
            self.temperature = 0.0

    @property
    def blind(self):
        """Whether positions are chosen before the model is asked."""
        return self.remasking in BLIND

    @property
    def adaptive(self):
        """The rule of ADAPTIVE that is asked for, or None."""
        return next((name for name in ADAPTIVE if getattr(self, name) is not None), None)

    def with_habits(self, config):
        """What is None as the model has it."""
        own = {}
        is_plain = self.remasking == "low_confidence" and not (self.adaptive or self.alg_temp)
        if is_plain and config.threshold is not None:
            own["threshold"] = config.threshold
        if self.threshold is not None or own:
            if self.minimum is None:
                own["minimum"] = 1 if config.threshold is None else 0
            if self.edit_threshold is None:
                own["edit_threshold"] = config.edit_threshold
        return replace(self, **own)

    def check(self, config, sequences):
        """Raises ValueError for what cannot be, naming it."""
        self.check_ranges()
        check_tokens(config, sequences, is_canvas=True)
        check_tokens(config, (self.suppress, self.defer))
        self.check_combinations(config)
        longest = max(map(len, sequences), default=0)
        if longest > config.max_len:
            raise ValueError(f"{longest} tokens, prompt and completion, exceed the model's context "
                             f"of {config.max_len}")

    def check_ranges(self):
        limits = {"temperature": (0, None), "cfg_scale": (0, None), "entropy_bound": (0, None),
                  "alg_temp": (0, None), "threshold": (0, 1), "top_p": (0, 1), "remask": (0, 1),
                  "top_k": (1, None), "steps": (1, 10**6), "minimum": (0, 10**6),
                  "edit_threshold": (0, 1), "edit_passes": (0, 10**6)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None or low <= value <= (high or math.inf) and value < math.inf:
                continue
            if high:
                raise ValueError(f"{name} must be between {low} and {high}, got {value}")
            if low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
            raise ValueError(f"{name} must not be negative, got {value}")
        if self.factor is not None and not self.factor > 0:
            raise ValueError(f"factor must be positive, got {self.factor}")
        choices = {"remasking": REMASKING, "cache": (None, "prefix", "dual", "block"),
                   "schedule": (None, *STEP_SCHEDULES), "remask_schedule": REMASK_SCHEDULES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(choice for choice in allowed if choice is not None)
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")

    def check_combinations(self, config):
        rules = [name for name in ADAPTIVE if getattr(self, name) is not None]
        if self.alg_temp:
            rules.append("alg_temp")
        exact = config.causal or config.block_length or self.cache == "block"
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)} exclude each other")
        if self.adaptive in ("threshold", "factor") and self.remasking != "low_confidence":
            raise ValueError("threshold and factor need low_confidence")
        if self.blind and (rules or self.defer):
            raise ValueError(f"{(rules or ['defer'])[0]} needs a rule that asks the model, not "
                             f"{self.remasking}")
        if self.edit_threshold is not None:
            self.check_editing(config)
        if self.minimum and self.threshold is None:
            raise ValueError("minimum is for sampling with a threshold")
        if self.remask and (self.remasking != "ancestral" or config.causal):
            raise ValueError("remask needs remasking ancestral, and no autoregressive model")
        if self.remask_schedule != "cap" and not self.remask:
            raise ValueError("remask_schedule says how often remask masks tokens again: set remask")
        if self.schedule is not None:
            self.check_schedule(config)
        if config.causal and (rules or self.defer):
            raise ValueError(f"{(rules or ['defer'])[0]} is not for autoregressive models, which "
                             "write one token a pass, from left to right")
        if self.cache in ("prefix", "dual") and exact:
            raise ValueError(f"cache {self.cache!r} is for bidirectional models; this one takes "
                             "'block'")
        if self.cfg_scale > 0 and (self.cache or exact):
            raise ValueError("cfg_scale works without a cache and for bidirectional models only")

    def check_schedule(self, config):
        """Nothing that is asked for may be without effect: who says how many tokens a step keeps?
        LLaDA2's threshold keeps as many as the schedule says at least."""
        decides = None
        if config.causal:
            decides = "an autoregressive model, which writes one token a pass,"
        elif self.remasking == "ancestral":
            decides = "remasking ancestral"
        elif self.adaptive and self.minimum != 0:
            decides = self.adaptive
        if decides:
            raise ValueError(f"schedule is how many tokens a step keeps, and {decides} decides "
                             "that itself: leave one of them out")

    def check_editing(self, config):
        if self.threshold is None:
            raise ValueError("edit_threshold needs a threshold")
        if config.causal or self.cache in ("prefix", "dual") or self.cfg_scale > 0:
            raise ValueError("edit_threshold is not for autoregressive models, approximate caches "
                             "and cfg_scale")

    def distribution(self, logits, config):
        """(logits [N, V], temperature): what tokens are drawn and confidence is read from."""
        if self.suppress:
            logits[:, list(self.suppress)] = -torch.inf
        filtered = self.top_p is not None or self.top_k is not None
        if not (filtered or config.confidence_at_temperature):
            return logits, self.temperature
        logits = filter_logits(logits / (self.temperature or 1), self.top_p, self.top_k)
        return logits, float(self.temperature > 0)

    def score(self, logits, chosen):
        """float64 [N]: what the rule says of the chosen tokens; deferred ones come last."""
        rule = REMASKING[self.remasking]
        if not self.defer:
            return rule(logits, chosen).double()
        deferred = torch.tensor(self.defer, device=logits.device)
        # LLaDA reads the others' confidence without the deferred tokens, too.
        score = rule(logits.index_fill(1, deferred, -torch.inf), chosen).double()
        return score.masked_fill(torch.isin(chosen, deferred), -1e9)

    def keep(self, score, eligible, count, logits, draw):
        """bool [A, T]: the predictions that stay. count int [A], for rules that do not decide that
        themselves; draw(): uniform numbers [A, T]."""
        if self.threshold is not None:
            return keep_confident(score, eligible, self.threshold, count)
        if self.factor is not None:
            return keep_factor(score, eligible, self.factor)
        if self.entropy_bound is not None:
            entropies = torch.zeros_like(score)
            entropies[eligible] = -entropy(logits, None).double().cpu()
            return keep_entropy_bound(score, entropies, eligible, self.entropy_bound)
        if self.alg_temp:
            score = perturb(score, self.alg_temp, draw())
        return keep_best(score, eligible, count)


# --------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Step:
    """What `on_step` gets after each denoising step. Rows may stand at different steps."""
    number: int                 # forward passes so far
    tokens: torch.Tensor        # int64 [B, T], mask tokens where still open
    revealed: torch.Tensor      # bool [B, T]: written by this step
    confidence: torch.Tensor    # float64 [B, T]: the score (of blind rules the probability) of what
    #                             was revealed, 0 elsewhere
    lengths: torch.Tensor       # int64 [B]: the rest of a row is padding
    settled: torch.Tensor = None    # int64 [B]: where tokens may be written anew or masked again,
    #                             so many from the left will stay; None: what is written stays


@dataclass
class Turn:
    """A denoising step of the rows that have one to do: what is asked, and what comes of it."""
    work: list                  # the A rows
    rows: torch.Tensor          # int64 [A]: their numbers
    block: torch.Tensor         # int64 [A]: the block that each works on
    own: torch.Tensor           # bool [A, T]: positions of that block that were not given
    open: torch.Tensor          # bool [A, T]: the masks that are predicted
    written: torch.Tensor       # bool [A, T]: tokens that are looked at again, to be written anew
    again: torch.Tensor         # bool [A, T]: tokens that become masks again
    predicted: torch.Tensor     # int64 [A, T]: what the model says at `open` and `written`
    score: torch.Tensor         # float64 [A, T]: what the rule says of that
    keep: torch.Tensor          # bool [A, T]: where it is written to the canvas


class Engine:
    """One run: the canvas of all rows, and for each of them the step at which it stands."""

    def __init__(self, model, sequences, begins, how, stop_early=False):
        """begins: where each row's first block begins. stop_early: an end of text ends a row whose
        order is left to right. Raises ValueError."""
        self.model, self.config = model, config_of(model)
        self.how = how = how.with_habits(self.config)
        how.check(self.config, sequences)
        B, self.mask_id = len(sequences), canvas_mask_id(model)
        # How long the rows are that the caller gets; a canvas may be longer.
        self.asked = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        if self.config.blocks_from_start:
            begins = [0] * B
            if stop_early:
                sequences = [self.with_whole_block(sequence) for sequence in sequences]
        self.lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        self.T = max(map(len, sequences), default=0)
        self.canvas = torch.zeros(B, self.T, dtype=torch.int64)
        for b, sequence in enumerate(sequences):
            self.canvas[b, :len(sequence)] = torch.tensor(list(sequence))
        position = torch.arange(self.T)
        self.shown = position < self.lengths[:, None]                                   # [B, T]
        self.is_masked = (self.canvas == self.mask_id) & self.shown
        self.given = self.shown & ~self.is_masked
        # Which block a position lies in; negative left of the first.
        self.block_of = (position - torch.tensor(begins)[:, None]) // how.block_length  # [B, T]
        self.cache = "block" if self.config.causal else how.cache
        self.left_to_right = self.cache == "block" or self.config.block_length > 0
        self.ends = torch.tensor(())
        if stop_early and self.left_to_right:
            self.ends = torch.tensor(self.config.ends)
        self.rows = self.make_rows()
        self.streams = row_streams(how.seed, B)
        self.passes = 0
        self.sureness = torch.zeros(B, self.T, dtype=torch.float64)     # score when written
        self.unsettled = 0          # blocks whose editing ended at its limit

    def with_whole_block(self, sequence):
        """A sequence with masks up to the end of its last block, as far as the context goes."""
        block_length = self.how.block_length
        end = math.ceil(len(sequence) / block_length) * block_length
        return sequence + [self.mask_id] * (min(end, self.config.max_len) - len(sequence))

    def make_rows(self):
        schedule = STEP_SCHEDULES[self.how.schedule or self.config.step_schedule]
        by_steps = not (self.config.causal or self.how.adaptive)
        rows = []
        for b in range(len(self.canvas)):
            numbers, masks = self.block_of[b][self.is_masked[b]].unique(return_counts=True)
            sizes = masks
            if self.config.blocks_from_start:           # the prompt's end counts as well
                sizes = self.block_of[b][self.shown[b]].bincount()[numbers]
            if by_steps and self.how.steps < len(numbers):
                raise ValueError(f"{self.how.steps} steps are too few for {len(numbers)} blocks: "
                                 "each needs at least one")
            blocks = zip(numbers.tolist(), sizes.tolist(), masks.tolist())
            rows.append(Row(b, list(blocks), self.how, schedule))
        return rows

    @torch.no_grad()
    def run(self):
        """The filled sequences, a list of lists."""
        kind = CachedPasses if self.cache else Passes
        self.look = kind(self)
        with kernels.packed(self.model):
            work = self.advance()
            while work:                                 # finished rows cost nothing
                self.step(work)
                work = self.advance()
        if self.unsettled:
            warnings.warn(f"editing ended at its limit of {self.how.edit_passes} passes in "
                          f"{self.unsettled} blocks, where tokens went on replacing each other",
                          stacklevel=3)
        lengths = torch.minimum(self.lengths, self.asked)
        return [row[:length].tolist() for row, length in zip(self.canvas, lengths)]

    def advance(self):
        """The rows that have a step to do, each moved on to it."""
        current = torch.tensor([row.block for row in self.rows])                        # [B]
        left = (self.is_masked & (self.block_of == current[:, None])).sum(1).tolist()
        return [row for row in self.rows if row.advance(left[row.index])]

    def step(self, work):
        """One denoising step of the rows at work: choose positions, predict, keep, write."""
        turn = self.turn_of(work)
        asked = turn.open | turn.written
        looked = bool(asked.any())
        if looked:
            logits = self.look(turn.rows, asked, turn.block)                            # [N, V]
            self.passes += 1
            is_open = turn.open[asked].to(logits.device)                                # [N]
            if turn.written.any():
                self.edit(turn, logits[~is_open])
                logits = logits[is_open]
            if turn.open.any():
                self.predict(turn, logits)
        self.write(turn)
        if len(self.ends):
            for row in work:
                self.stop_at_end(row)
        if self.how.on_step is not None and looked:
            self.report(turn)

    def turn_of(self, work):
        """The Turn of these rows: at which positions the model is asked."""
        rows = torch.tensor([row.index for row in work])                                # [A]
        block = torch.tensor([row.block for row in work])                               # [A]
        inside = (self.block_of[rows] == block[:, None]) & self.shown[rows]             # [A, T]
        nothing = torch.zeros_like(inside)
        turn = Turn(work, rows, block, own=inside & ~self.given[rows],
                    open=inside & self.is_masked[rows], written=nothing, again=nothing,
                    predicted=self.canvas[rows], score=nothing.double(), keep=nothing)
        if self.how.blind:
            self.choose_blindly(turn)
        if self.how.edit_threshold is not None:
            turn.written = turn.own & ~turn.open
        return turn

    def choose_blindly(self, turn):
        """Leave in `open` the masks that are written, and put the tokens that become masks again
        into `again`, before the model is asked."""
        masked, written = turn.open, turn.own & ~turn.open
        u = draw(self.streams, turn.rows, masked | written if self.how.remask else masked)
        if self.how.remasking == "random":
            count = torch.tensor([row.count for row in turn.work])
            turn.open = keep_best(u, masked, count)
            return
        chances = torch.tensor([row.chances for row in turn.work], dtype=torch.float64)  # [A, 2]
        write, sigma = chances[:, :1], chances[:, 1:]
        if self.how.remask_schedule == "conf":
            unsure = torch.where(written, -self.sureness[turn.rows], -torch.inf)
            sigma = sigma * unsure.softmax(dim=1)
        turn.open = masked & (u < write)
        turn.again = written & (u < sigma)

    def predict(self, turn, logits):
        """Predict the tokens at the `open` positions, logits [N, V] there, and say which stay."""
        logits, chosen = self.choose(turn, logits)
        turn.predicted[turn.open] = chosen.cpu()
        conf = self.how.remask_schedule == "conf"
        if not self.how.blind or self.how.on_step is not None or conf:
            turn.score[turn.open] = self.how.score(logits, chosen).cpu()
        keep = turn.open
        if not self.how.blind:
            count = torch.tensor([row.count for row in turn.work])
            keep = self.how.keep(turn.score, turn.open, count, logits,
                                 lambda: draw(self.streams, turn.rows, turn.open))
        turn.keep = turn.keep | keep

    def choose(self, turn, logits):
        """(logits [N, V], tokens [N]) at the `open` positions."""
        if self.mask_id < logits.shape[1]:
            # The mask itself may be predicted, and the position stays open; but not in a last step.
            is_last = torch.tensor([row.is_last for row in turn.work])[turn.open.nonzero()[:, 0]]
            logits[:, self.mask_id].masked_fill_(is_last.to(logits.device), -torch.inf)
        logits, temperature = self.how.distribution(logits, self.config)
        u = None
        if temperature > 0:
            u = draw(self.streams, turn.rows, turn.open)[turn.open]
        return logits, kernels.sample_tokens(logits, temperature, u)

    def edit(self, turn, logits):
        """Say which of the `written` positions are written anew (the rule of diffusion.rewrites);
        logits [N, V] there."""
        mask_id = torch.tensor(self.mask_id, device=logits.device)
        chosen = kernels.largest(logits.index_fill(1, mask_id, -torch.inf))
        sure = low_confidence(logits, chosen).cpu()
        chosen, anew = chosen.cpu(), turn.written.clone()
        differs = chosen != turn.predicted[turn.written]
        anew[turn.written] = differs & (sure > self.how.edit_threshold)
        turn.predicted[turn.written], turn.score[turn.written] = chosen, sure
        turn.keep = turn.keep | anew
        for row, changed in zip(turn.work, anew.any(1).tolist()):
            row.unchanged = row.looks > 0 and not changed
            if changed and row.looks and row.looks == self.how.edit_passes:
                self.unsettled += 1

    def write(self, turn):
        rows = turn.rows
        tokens = torch.where(turn.keep, turn.predicted, self.canvas[rows])
        self.canvas[rows] = torch.where(turn.again, self.mask_id, tokens)
        self.is_masked[rows] = (self.canvas[rows] == self.mask_id) & self.shown[rows]
        if self.how.remask_schedule == "conf":
            self.sureness[rows] = torch.where(turn.keep, turn.score, self.sureness[rows])

    def stop_at_end(self, row):
        """If the row's block is finished and an end of text was written in it, it is the row's
        last."""
        b = row.index
        inside = (self.block_of[b] == row.block) & self.shown[b]
        if (self.is_masked[b] & inside).any() or self.how.remask and not row.is_last:
            return
        if not row.edits_are_done:
            return
        if torch.isin(self.canvas[b][inside & ~self.given[b]], self.ends).any():
            self.shown[b] &= self.block_of[b] <= row.block
            self.lengths[b] = int(self.shown[b].sum())
            row.blocks = []

    def report(self, turn):
        revealed = torch.zeros_like(self.is_masked)
        confidence = torch.zeros(revealed.shape, dtype=torch.float64)
        revealed[turn.rows] = turn.keep
        confidence[turn.rows] = torch.where(turn.keep, turn.score, 0)
        self.how.on_step(Step(self.passes, self.canvas.clone(), revealed, confidence,
                              torch.minimum(self.lengths, self.asked), self.settled()))

    def settled(self):
        """int64 [B]: the positions left of the block that each row works on, where alone a step
        changes anything; None where it never changes what is written."""
        if self.how.edit_threshold is None and not self.how.remask:
            return None
        current = torch.tensor([row.block for row in self.rows])                        # [B]
        return (self.shown & (self.block_of < current[:, None])).sum(1)


class Row:
    """Where one row stands: its block, and the step in it. Rows advance independently."""

    def __init__(self, index, blocks, how, schedule):
        """blocks: (number, size, masks) of each block that holds masks, from the left. The size is
        what the schedule divides among the steps: the masks; of LLaDA2 all positions."""
        self.index, self.how, self.schedule = index, how, schedule
        self.blocks = blocks    # those not begun yet
        self.steps = math.ceil(how.steps / max(len(blocks), 1))     # for each block
        self.block = 0          # the one it works on
        self.size = 0           # of that block
        self.done = 0           # its steps that are done
        self.count = 0          # predictions that the step keeps, if the schedule says so
        self.is_last = False    # the block's last step: all is written
        self.chances = (1.0, 0.0)   # "ancestral": of writing a mask, of masking again
        self.looks = 0          # passes since the block's last mask was gone: they edit only
        self.unchanged = False  # the last of them edited nothing
        if blocks:
            self.enter_next_block()

    def enter_next_block(self):
        """Returns how many masks it has."""
        self.block, self.size, masks = self.blocks.pop(0)
        self.done, self.looks, self.unchanged = 0, 0, False
        return masks

    def advance(self, left):
        """Move on to the next step that changes anything; false when the row is done. left: the
        masks of its block."""
        while True:
            if self.is_filled(left) and not self.edits_are_done:
                self.looks, self.count = self.looks + 1, 0
                return True
            if self.is_filled(left):
                if not self.blocks:
                    return False
                left = self.enter_next_block()
            self.plan(left)
            self.done += 1
            if self.count or self.how.remask:           # a schedule may keep nothing in a step
                return True

    def is_filled(self, left):
        """Whether the block is, with `left` masks. With `remask` its tokens may become masks again
        in every step but the last."""
        if self.how.remask:
            return self.done >= self.steps
        return left == 0

    @property
    def edits_are_done(self):
        """Whether a block without masks is left as it is: edits were not asked for, the last look
        changed nothing, or there were enough."""
        if self.how.edit_threshold is None:
            return True
        return self.unchanged or self.looks >= self.how.edit_passes

    def plan(self, left):
        """What the step number `done` does, with `left` masks in the block."""
        at_least = 1 if self.how.minimum is None else self.how.minimum
        # A rule such as `threshold` decides how many predictions a step keeps. It keeps one at
        # least, so a block takes no more steps than it has tokens. But with a minimum of 0, which
        # is LLaDA2's, the schedule goes on and the rule may add to it.
        by_rule = self.how.adaptive is not None and at_least > 0
        steps = self.size if by_rule else self.steps
        self.is_last = self.done >= steps - 1
        if by_rule:
            self.count = at_least
        elif self.is_last or self.how.remasking == "ancestral":
            self.count = left
        else:
            self.count = self.schedule(self.size, left, self.done, self.steps)
        if self.how.remasking == "ancestral":
            self.chances = reverse_step(self.done, self.steps, self.how.remask,
                                        self.how.remask_schedule)


def row_streams(seed, B):
    """A generator for each of B rows; `seed` as in `Sampling`. Raises ValueError for another number
    of seeds."""
    if isinstance(seed, list | tuple):
        if len(seed) != B:
            raise ValueError(f"a list of seeds has one for each row, {B}, got {seed}")
        return [streams(own, 1)[0] for own in seed]
    return streams(seed, B)


def draw(streams, rows, where):
    """Uniform numbers at `where` [A, T], every row's from its own stream, float64; 1 elsewhere."""
    u = torch.ones(where.shape, dtype=torch.float64)
    u[where] = draw_uniform([streams[b] for b in rows.tolist()], where)
    return u


# --------------------------------------------------------------------------------------------------
# What the model is fed


class Passes:
    """Forward passes without a cache: the whole canvas of the rows at work."""

    def __init__(self, engine):
        self.engine, self.model, self.config = engine, engine.model, engine.config
        self.shift = int(self.config.shift or self.config.causal)
        self.device = next(self.model.parameters()).device

    def __call__(self, rows, eligible, block):
        """Logits float32 [N, V] that predict the tokens at `eligible` [A, T] of these rows [A],
        whose current blocks are [A]."""
        e, scale = self.engine, self.engine.how.cfg_scale
        width = int(e.lengths[rows].max())
        tokens, shown = e.canvas[rows, :width], e.shown[rows, :width]
        mask = None
        if e.left_to_right:                             # a block never sees later ones
            block_of = e.block_of[rows, :width]
            mask = block_of[:, None, :] <= block_of[:, :, None]                         # [A, S, T]
        if not shown.all():                             # nor anybody the padding of a shorter row
            mask = shown if mask is None else mask & shown[:, None, :]
        where = eligible[:, :width].nonzero()
        if not scale:
            return self.logits(tokens, where, mask)
        given = e.given[rows, :width]
        without = torch.where(given, e.mask_id, tokens)
        logits = self.logits(tokens, where, mask)
        return guided(logits, self.logits(without, where, mask), scale)

    def logits(self, tokens, where, mask=None, **how):
        """Logits [N, V] for the (row, column) pairs `where` [N, 2] of tokens [A, S]."""
        column = (where[:, 1] - self.shift).clamp(min=0)
        flat = (where[:, 0] * tokens.shape[1] + column).to(self.device)
        tokens = tokens.clamp(max=self.config.vocab_size - 1).to(self.device)
        if mask is not None:
            how["attention_mask"] = mask.to(self.device)
        if not isinstance(self.model, Transformer):
            return row_logits(self.model, tokens, flat, **how)
        logits = self.model(tokens, select=flat, **how)     # the same; it takes rows by index
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class CachedPasses(Passes):
    """Forward passes that feed some positions and attend to keys and values of all.

    "prefix" and "dual" (Fast-dLLM, 2505.22618): when a row enters a block, all of it is fed; in the
    block's further steps only what stands from its begin on, or it alone. Other keys are as old as
    the block: an approximation. "block", where a block never sees later ones: finished blocks
    are final, so what is fed is what is not final yet. Exact.
    """

    def __init__(self, engine):
        super().__init__(engine)
        B, self.T, self.kind = len(engine.canvas), engine.T, engine.cache
        dtype = next(self.model.parameters()).dtype
        self.cache = Cache(self.config, B, self.T, self.device, dtype)
        self.entered = torch.full((B,), -1)     # prefix, dual: the block whose keys are all fresh
        self.finished = torch.zeros(B, dtype=torch.int64)   # block: so many keys of a row are final

    def __call__(self, rows, eligible, block):
        e = self.engine
        inside = (e.block_of[rows] == block[:, None]) & e.shown[rows]                   # [A, T]
        begin = inside.int().argmax(1)                                                  # [A]
        end = torch.where(inside, torch.arange(self.T) + 1, 0).amax(1)
        if self.kind == "block":
            return self.refresh_unfinished(rows, eligible, begin, end)
        begin = (begin - self.shift).clamp(min=0)
        if self.kind == "prefix":
            end = e.lengths[rows]
        enters = self.entered[rows] != block
        self.entered[rows] = block
        begin, end = torch.where(enters, 0, begin), torch.where(enters, e.lengths[rows], end)
        if enters.all() or not enters.any():
            return self.refresh(rows, eligible, begin, end)
        # Rows that enter a block are fed in a pass of their own: it is much wider.
        row_of, logits = eligible.nonzero()[:, 0], None
        for group in (enters, ~enters):
            part = self.refresh(rows[group], eligible[group], begin[group], end[group])
            if logits is None:
                logits = part.new_empty(len(row_of), part.shape[1])
            logits[group[row_of].to(logits.device)] = part
        return logits

    def refresh_unfinished(self, rows, eligible, begin, end):
        causal = self.config.causal
        logits = self.refresh(rows, eligible, self.finished[rows], begin if causal else end)
        # A blind rule may write nothing in a row's step, which then feeds nothing.
        fed = eligible.any(1)
        finished = begin
        if not causal:                                  # the row before predicts the first token
            finished = (begin - self.shift).clamp(min=0)
        self.finished[rows[fed]] = finished[fed]
        return logits

    def refresh(self, rows, eligible, begin, end):
        """Feed positions begin..end [A] of each row, write their keys and values to the cache,
        attend to all of it that is to be seen."""
        e = self.engine
        positions = begin[:, None] + torch.arange(int((end - begin).max()))             # [A, S]
        # A row with fewer of them repeats its last one, which writes the same keys again.
        positions = torch.minimum(positions, end[:, None] - 1)
        tokens = e.canvas[rows[:, None], positions]
        # Keys that nobody sees are not even read.
        seen = end if self.kind == "block" else e.lengths[rows]
        self.cache.length = length = int(seen.max())
        mask = e.shown[rows, :length]                                              # [A, length]
        if self.kind == "block" and not self.config.causal:
            block_of = e.block_of[rows[:, None], positions]                             # [A, S]
            order = e.block_of[rows, None, :length] <= block_of[:, :, None]     # [A, S, length]
            mask = order & mask[:, None, :]
        mask = kernels.unless_all(mask)
        self.cache.rows = None if len(rows) == len(e.canvas) else rows.to(self.device)
        where = eligible.nonzero()
        where[:, 1] -= begin[where[:, 0]]
        return self.logits(tokens, where, mask, cache=self.cache,
                           positions=positions.to(self.device))
