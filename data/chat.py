"""Conversations in which the responses are marked: what turns a model of text into one that chats.

chat_sets.py finds conversations. `render` writes one with the chat template of the tokenizer, the
checkpoint's own. Only what the assistant said, with the token that ends its turn, is a response;
all else is given.

Beside train.bin and val.bin (see loader.py) stand train.mask and val.mask, a byte a token, 1 in a
response, and train.index and val.index, (start, length, first response) of each conversation as
int64. All are memory-mapped. A conversation is stored whole. A batch is a pure function of (seed,
step, rank), as in loader.py; its conversations are of like length, so that little of it is padding.
"""
import functools
import itertools
import math
import os
import re
from dataclasses import dataclass

import numpy as np
import torch

from data.chat_sets import checked, is_chat
from data.loader import SPLITS, TokenDataset
from data.templates import render_template

POOL = 64               # batches whose conversations are sorted by length together
LENGTH_MULTIPLE = 32    # of which T is a multiple: few shapes for compiled code

# --------------------------------------------------------------------------------------------------
# Rendering: where are the responses?


def render(messages, tokenizer):
    """(text of a conversation, [(begin, end) of each response in it]). The text ends where the
    last response does.

    A response begins where the prompt ends that sampling would feed, and ends with what closes its
    turn (<|im_end|>). Where a template rewrites earlier turns (drops what was thought, say), the
    conversation up to one of them is not the beginning of the whole: then the last response counts
    alone.
    """
    checked(messages)
    turns = []                                          # places of the responses
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip():
            turns.append(i)
    if not turns:
        raise ValueError("it has no response")
    messages = messages[:turns[-1] + 1]                 # what nobody answers teaches nothing
    roles = tuple(tokenizer.roles.items())
    ending, is_header = find_ending(tokenizer.chat_templates.get("default"), roles)
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    if is_header:
        whole = whole.removesuffix(ending)
    spans = []
    for i in turns:
        begin = find_begin(messages[:i], whole, tokenizer, ending)
        upto = whole
        if i != turns[-1]:
            upto = tokenizer.render_chat(messages[:i + 1], add_generation_prompt=False)
            upto = upto.removesuffix(ending)
        if begin is not None and whole.startswith(upto) and begin < len(upto):
            spans.append((begin, len(upto)))
    if not spans or spans[-1][1] != len(whole):
        raise ValueError("its template does not write a response after the prompt")
    if len(spans) < len(turns):
        spans = spans[-1:]
    return whole, spans


def find_begin(before, whole, tokenizer, ending):
    """Where the response to the messages `before` begins in the text of the whole conversation;
    None if it has no such place.

    That is after the prompt. Some prompts end with more than the template writes before an answer
    (<think>): then what both have in common counts. A stand-in for the answer that begins like no
    prompt shows how much that is. The true answer would not: it may begin with "<t" itself.
    """
    prompt = tokenizer.render_chat(before)
    if whole.startswith(prompt):
        return len(prompt)
    stand_in = {"role": "assistant", "content": "\ue000"}           # a character that no text uses
    answered = tokenizer.render_chat([*before, stand_in], add_generation_prompt=False)
    begin = common_length(prompt, answered)
    asked = tokenizer.render_chat(before, add_generation_prompt=False).removesuffix(ending)
    least = common_length(prompt, asked)                            # what was asked is no answer
    if begin == 0 or begin < least or not whole.startswith(prompt[:begin]):
        return None
    return begin


@functools.lru_cache(maxsize=8)
def find_ending(template, roles):
    """(what a template writes after the last answer only, whether that is the header of a next
    answer). roles: a tokenizer's, as pairs.

    Some templates end every conversation with the assistant's header, whether it is asked for or
    not (LLaDA's), some with an end of text (Phi-3's). Most write nothing: ("", False). A small
    conversation and a longer one tell: what follows the answer in both is the end of its turn and
    perhaps the beginning of the next header, with which the whole conversation begins, too.
    """
    question = {"role": "user", "content": "ask-1"}
    answer = {"role": "assistant", "content": "reply-1"}
    more = {"role": "user", "content": "ask-2"}
    try:
        asked = show(template, roles, [question], add_generation_prompt=True)
        closed = show(template, roles, [question, answer])
        longer = show(template, roles, [question, answer, more])
    except ValueError:
        return "", False
    if "reply-1" not in closed or "reply-1" not in longer:
        return "", False
    closed = closed.rpartition("reply-1")[2]            # what follows the answer
    longer = longer.rpartition("reply-1")[2]
    if longer.startswith(closed):
        return "", False
    turn_end = closed[:common_length(closed, longer)]
    turn_end = without_header(turn_end, asked)
    ending = closed[len(turn_end):]
    is_header = asked.endswith(ending)
    if not turn_end and not is_header:
        return "", False
    return ending, is_header


def show(template, roles, messages, add_generation_prompt=False):
    """A conversation as the template writes it."""
    variables = {"tools": None, "documents": None, **dict(roles), "messages": messages,
                 "add_generation_prompt": add_generation_prompt}
    return render_template(template, variables)


def without_header(turn_end, conversation):
    """The end of a turn without the beginning of a next header, if it ends with one: a text with
    which the conversation begins, perhaps after tags like <s>. Nor does it end inside a tag."""
    tags = re.match(r"(<[^<>\s]*>|\[[^\[\]\s]*\])*", conversation)[0]
    places = [0] + [i + 1 for i, character in enumerate(tags) if character in ">]"]
    shared = 0
    for length in range(1, len(turn_end)):
        if any(conversation.startswith(turn_end[-length:], place) for place in places):
            shared = length
    turn_end = turn_end[:len(turn_end) - shared]
    return re.sub(r"(<[^<>\s]*|\[[^\[\]\s]*)$", "", turn_end)


def common_length(a, b):
    """How many characters two texts have in common at their beginning."""
    return len(os.path.commonprefix([a, b]))


def encode_rendered(rendered, tokenizer):
    """Yields (ids, mask) for each (text, spans) of `render`: list of int and as many uint8, 1 in a
    response.

    The prompt's ids are those that sampling will feed. The whole is encoded at once where its
    tokens end at each border of a response; else, as BPE may merge across one, piece by piece.
    """
    # The template writes control tokens; but nobody's words become a mask.
    encode = functools.partial(tokenizer.encode_batch, parse_special=True, parse_mask=False)
    borders = [list(itertools.chain(*spans)) for _, spans in rendered]  # the last: the text's end
    beginnings = []                                     # of the texts, up to each border
    for (text, _), ends in zip(rendered, borders):
        beginnings += [text[:end] for end in ends]
    encoded = iter(encode(beginnings))
    for (text, _), ends in zip(rendered, borders):
        parts = list(itertools.islice(encoded, len(ends)))
        ids = parts[-1]
        places = [len(part) for part in parts]          # of the borders among the ids
        if any(ids[:len(part)] != part for part in parts):
            cuts = itertools.pairwise([0, *ends])
            pieces = encode([text[begin:end] for begin, end in cuts])
            ids = list(itertools.chain(*pieces))
            places = np.cumsum([len(piece) for piece in pieces])
        mask = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in zip(places[::2], places[1::2]):
            mask[begin:end] = 1
        yield ids, mask


# --------------------------------------------------------------------------------------------------
# Reading


@dataclass
class ChatBatch:
    """What a training step reads; of text, tokens alone."""
    tokens: torch.Tensor                            # int64 [B, T]
    # bool [B, T]: what may be masked and is counted; None: everything
    maskable: torch.Tensor | None = None
    # bool [B, T]: what is no padding; None: everything is to be seen
    attention_mask: torch.Tensor | None = None
    # Its counted tokens over the mean of the step's slices: times this, means per token add up.
    share: float = 1.0

    def spread(self, n):
        """n of its rows, evenly spread, as a ChatBatch."""
        n = min(n, len(self.tokens))
        places = torch.linspace(0, len(self.tokens) - 1, n)
        return self.rows(places.long())

    def rows(self, which, share=1.0):
        """The rows that an index or a slice names, as a ChatBatch."""
        maskable = None if self.maskable is None else self.maskable[which]
        shown = None if self.attention_mask is None else self.attention_mask[which]
        return ChatBatch(self.tokens[which], maskable, shown, share)

    def to(self, device):
        """The same on a device."""
        maskable = None if self.maskable is None else self.maskable.to(device)
        shown = None if self.attention_mask is None else self.attention_mask.to(device)
        return ChatBatch(self.tokens.to(device), maskable, shown, self.share)


def open_dataset(dataset, folder, seq_len, padding="eos", block_length=0):
    """The ChatDataset or, of text, the TextDataset in a folder that `prepare(dataset, ...)` made:
    one interface for both."""
    if is_chat(dataset):
        return ChatDataset(folder, seq_len, padding, block_length)
    return TextDataset(folder, seq_len)


class TextDataset(TokenDataset):
    """Prepared text as windows of seq_len tokens, with the methods of ChatDataset."""

    def __init__(self, folder, seq_len):
        super().__init__(folder)
        self.seq_len = seq_len

    def batch(self, split, batch_size, seed, step, rank=0, world_size=1):
        """The ChatBatch that `rank` of `world_size` sees at `step`, as TokenDataset.batch."""
        tokens = super().batch(split, batch_size, self.seq_len, seed, step, rank, world_size)
        return ChatBatch(tokens)

    def epoch_length(self):
        """Training windows that an epoch visits."""
        return max(1, len(self.train) // self.seq_len)

    def step_length(self, sequences, seed, step):
        """T of a training step."""
        return self.seq_len

    def val_batch(self, max_examples=None):
        """The first windows of the validation split, all or so many, as a ChatBatch."""
        max_tokens = None if max_examples is None else max_examples * self.seq_len
        return ChatBatch(self.windows("val", self.seq_len, max_tokens))

    def val_bytes_per_token(self, batch, tokenizer):
        """UTF-8 bytes per token of the validation split."""
        return self.bytes_per_token("val")

    def prompt(self, split, number):
        """A text has no prompt: two empty lists."""
        return [], []

    def summary(self):
        """What is trained on, in a line."""
        return f"{len(self.train):,} training tokens in windows of {self.seq_len}"


class ChatDataset(TokenDataset):
    """Prepared conversations; attributes as TokenDataset has them, and for each split in a dict
    `examples`, `truncated` (longer than seq_len: cut) and `dropped` (the prompt alone fills
    seq_len: not used), the numbers of conversations.

    padding       "eos": a response ends in end-of-text tokens up to the end of the batch, which are
                  part of it, may be masked and are learned. So the model finds out how long an
                  answer is, for sampling begins with more masks than are needed (LLaDA, arXiv
                  2502.09992, appendix B.1). "hidden": nobody sees the padding; cheaper in tokens to
                  learn, but the model never says where an answer ends in a row of masks.
    block_length  divides the length of every batch, and a response with its end-of-text tokens ends
                  where a block does: no further block is needed to learn where to stop.
    Raises FileNotFoundError and ValueError for a folder that is missing or damaged, and for
    settings that do not fit.
    """

    def __init__(self, folder, seq_len, padding="eos", block_length=0):
        super().__init__(folder)
        if padding not in ("eos", "hidden"):
            raise ValueError(f"padding must be eos or hidden, got {padding!r}")
        if padding == "eos" and self.eos_token_id is None:
            raise ValueError(f"the tokenizer of {folder} has no end-of-text token to pad with: "
                             "take padding=hidden")
        if block_length and seq_len % block_length:
            raise ValueError(f"block_length {block_length} does not divide seq_len {seq_len}")
        self.seq_len, self.padding, self.block_length = seq_len, padding, block_length
        self.multiple = LENGTH_MULTIPLE
        if block_length:
            self.multiple = block_length * math.ceil(LENGTH_MULTIPLE / block_length)
        self.masks, self.index, self.kept = {}, {}, {}
        self.examples, self.truncated, self.dropped = {}, {}, {}
        for split in SPLITS:
            self.masks[split], self.index[split] = self._open(split)
            self._count(split)
        # The processes and slices of a step share its batch, the steps of an epoch their order.
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._epoch_rows)
        self._step_batch = functools.lru_cache(maxsize=2)(self._step_batch)

    def _open(self, split):
        """(mask uint8 [tokens], index int64 [conversations, 3]), memory-mapped."""
        ids, again = getattr(self, split), f"delete {self.folder} and prepare it again"
        mask_path = self.folder / f"{split}.mask"
        index_path = self.folder / f"{split}.index"
        for path in (mask_path, index_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, so these are no conversations: "
                                        f"{again}")
        index_bytes = 3 * 8 * self.meta["documents"][split]
        fits = mask_path.stat().st_size == len(ids) and index_path.stat().st_size == index_bytes
        if fits:
            mask = np.memmap(mask_path, np.uint8, mode="r")
            index = np.memmap(index_path, "<i8", mode="r").reshape(-1, 3)
            start, length, _ = index[-1]
            fits = start + length == len(ids)
        if not fits:
            raise ValueError(f"{self.folder}: {split}.bin, {split}.mask and {split}.index do not "
                             f"belong together: {again}")
        return mask, index

    def _count(self, split):
        """Which conversations are kept, and how many are not whole."""
        _, length, first = self.index[split].T
        fits = first < self.seq_len
        self.kept[split] = np.flatnonzero(fits)
        self.examples[split] = len(length)
        self.dropped[split] = int((~fits).sum())
        self.truncated[split] = int((fits & (length > self.seq_len)).sum())
        if not fits.any():
            raise ValueError(f"the prompts of all {len(length)} {split} conversations fill the "
                             f"context of {self.seq_len} tokens: take a larger seq_len")

    def batch(self, split, batch_size, seed, step, rank=0, world_size=1):
        """The ChatBatch that `rank` of `world_size` sees at `step`; rank and world_size as in
        TokenDataset.batch.

        An epoch visits every conversation once (up to what is left of a step), in a random order of
        steps; T is the same for all ranks of a step, the longest conversation of it rounded up, at
        most seq_len.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} but world_size {world_size}: pass the number of "
                             "slices of a step")
        whole = self._step_batch(split, batch_size * world_size, seed, step)
        rows = slice(rank * batch_size, (rank + 1) * batch_size)
        counted = whole.maskable[rows].sum().item() * world_size
        return whole.rows(rows, share=counted / whole.maskable.sum().item())

    def epoch_length(self):
        """Training conversations that an epoch visits: those that are kept."""
        return len(self.kept["train"])

    def step_length(self, sequences, seed, step):
        """T of a training step that takes so many sequences in all its slices."""
        return self._step_batch("train", sequences, seed, step).tokens.shape[1]

    def val_batch(self, max_examples=None):
        """Conversations evenly spread over the validation split, where a mixture stands part after
        part, the shortest first; all or so many, as a ChatBatch.

        For diffusion.nelbo: padding is hidden and only what was answered counts, so that the figure
        does not depend on how batches are put together.
        """
        kept = self.kept["val"]
        n = min(len(kept), max_examples or len(kept))
        places = np.linspace(0, len(kept) - 1, n).round().astype(np.int64)
        rows = kept[places]
        by_length = np.argsort(self.index["val"][rows, 1], kind="stable")
        return self._collate("val", rows[by_length], "hidden")

    def val_bytes_per_token(self, batch, tokenizer):
        """UTF-8 bytes of the answers in a `val_batch` per token that counts."""
        num_bytes = 0
        for row, counted in zip(batch.tokens, batch.maskable):
            answer = tokenizer.decode(row[counted], skip_special_tokens=True)
            num_bytes += len(answer.encode())
        return num_bytes / batch.maskable.sum().item()

    def prompt(self, split, number):
        """(tokens before the first response, tokens of it and of what follows) of the n-th
        conversation that is kept: two lists."""
        kept = self.kept[split]
        row = kept[number % len(kept)]
        start, length, first = self.index[split][row]
        ids = getattr(self, split)[start:start + length].tolist()
        return ids[:first], ids[first:]

    def summary(self):
        """What training will not see, in a line."""
        left_out = sum(self.meta["left_out"].values())
        return (f"{self.examples['train']:,} conversations, {self.truncated['train']:,} of them "
                f"cut at {self.seq_len} tokens, {self.dropped['train']:,} dropped whose prompt "
                f"alone is that long, {left_out:,} left out without an answer")

    def _step_batch(self, split, per_step, seed, step):
        """The ChatBatch of all sequences of a step."""
        steps_of_epoch = max(1, len(self.kept[split]) // per_step)
        epoch, step = divmod(step, steps_of_epoch)
        rows = self._epoch_rows(split, per_step, seed, epoch)[step]
        return self._collate(split, rows, self.padding)

    def _epoch_rows(self, split, per_step, seed, epoch):
        """int64 [steps, per_step]: the conversations of each step of an epoch."""
        rng = np.random.default_rng((SPLITS.index(split), seed % 2**64, epoch))
        kept = self.kept[split]
        length = self.index[split][:, 1]
        steps = max(1, len(kept) // per_step)
        # np.resize repeats them where there are too few for one step.
        order = np.resize(rng.permutation(kept), steps * per_step)
        for begin in range(0, len(order), POOL * per_step):
            pool = order[begin:begin + POOL * per_step]     # a view: what is sorted is `order`
            pool[:] = pool[np.argsort(length[pool], kind="stable")]
        return order.reshape(steps, per_step)[rng.permutation(steps)]

    def _collate(self, split, rows, padding):
        """The ChatBatch of the conversations at `rows`, cut at seq_len and padded to one length."""
        ids, masks = getattr(self, split), self.masks[split]
        index = self.index[split][rows]                                                     # [B, 3]
        lengths = np.minimum(index[:, 1], self.seq_len)                                     # [B]
        T = math.ceil(lengths.max() / self.multiple) * self.multiple
        T = min(T, self.seq_len)
        fill = 0 if self.eos_token_id is None else self.eos_token_id
        tokens = np.full((len(rows), T), fill, dtype=np.int64)                              # [B, T]
        maskable = np.full((len(rows), T), padding == "eos")
        if padding == "eos" and self.block_length:
            blocks = -(-lengths // self.block_length)                                       # [B]
            maskable = np.arange(T) < (blocks * self.block_length)[:, None]
        for row, (start, length) in enumerate(zip(index[:, 0], lengths)):
            tokens[row, :length] = ids[start:start + length]
            maskable[row, :length] = masks[start:start + length]
        shown = None
        if padding == "hidden":
            shown = torch.from_numpy(np.arange(T) < lengths[:, None])
        return ChatBatch(torch.from_numpy(tokens), torch.from_numpy(maskable), shown)
