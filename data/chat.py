"""Conversations as token files in which the responses are marked: what turns a model of text into one that chats.

A data set is a name of CHAT_SETS or a .jsonl file; several are mixed by +, and [train:1000] takes the first thousand:

    tulu3[train:50000]+smoltalk       pydocs_chat       mine.jsonl+alpaca

A line of a .jsonl file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]} or
{"prompt": "...", "response": "..."}. A conversation is rendered by the chat template of the tokenizer, the checkpoint's own, and
stored whole. Only what the assistant said, with the token that ends its turn, is a response; all else is given.

Beside train.bin and val.bin (see loader.py) stand train.mask and val.mask, a byte a token, 1 in a response, and train.index and
val.index, (start, length, first response) of each conversation as int64. All are memory-mapped. A batch is a pure function of
(seed, step, rank), as in loader.py; its conversations are of like length, so that little of it is padding.
"""

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import prepare as text_sets
from data.loader import SPLITS, TokenDataset
from data.prepare import VAL_FRACTION, TokenWriter, docstrings, hash_fraction, shuffled, stream_rows
from data.tokenizer import Tokenizer, render_template

ROLES = ("system", "user", "assistant")
BATCH = 1000                # conversations encoded in one go
POOL = 64                   # batches whose conversations are sorted by length together
STREAM_VAL_FRACTION = 0.005  # of a streamed set
RENDERING = 2              # the rules that mark responses; what older ones prepared is made again


# ---------------------------------------------------------------- chat sets: each yields (text that decides the split, messages)

def pydocs_chat():
    """what is this signature of Python's library for? Its docstring: 2 MB, embedded"""
    documents = {f"{signature}\n{text}": (signature, text) for signature, text in docstrings()}
    for document in shuffled(documents):            # the same documents are held out here and in pydocs
        signature, text = documents[document]
        yield document, exchange(question(signature), text)


def question(signature):
    """One of a few ways to ask, chosen by the signature."""
    thing = "module" if signature.startswith("module ") else "class" if signature.startswith("class ") else "function"
    name = re.sub(r"^(async def|def|class|module) ([\w.]+).*", r"\2", signature, flags=re.DOTALL)
    ways = (f"What does this {thing} do?\n{signature}", f"Write a docstring for\n{signature}", f"Explain {signature}",
            f"What is the {thing} {name} for?\n{signature}")
    return ways[int(hash_fraction(signature) * len(ways))]


def alpaca():
    """Stanford Alpaca, 52,000 instructions and answers: streamed"""
    for row in stream_rows("tatsu-lab/alpaca"):
        yield keyed(exchange("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]))


def tulu3():
    """Tulu 3's mixture for fine-tuning, 939,000 conversations: streamed"""
    for row in stream_rows("allenai/tulu-3-sft-mixture"):
        yield keyed(row["messages"])


def smoltalk():
    """SmolTalk, 1,000,000 conversations: streamed"""
    for row in stream_rows("HuggingFaceTB/smoltalk", name="all"):
        yield keyed(row["messages"])


def opc():
    """OpenCoder's instructions of both stages whose answer is in Python: streamed"""
    configs = {"OpenCoder-LLM/opc-sft-stage1": ("filtered_infinity_instruct", "largescale_diverse_instruct", "realuser_instruct"),
               "OpenCoder-LLM/opc-sft-stage2": ("educational_instruct", "evol_instruct", "mceval_instruct", "package_instruct")}
    for repository, names in configs.items():
        for name in names:
            for row in stream_rows(repository, name=name):
                if "python" in (row["output"] or ""):
                    yield keyed(exchange(row["instruction"], row["output"]))


CHAT_SETS = {function.__name__: function for function in (pydocs_chat, alpaca, tulu3, smoltalk, opc)}


def exchange(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def keyed(messages):
    """(text that decides the split, messages)"""
    return "\n".join(str(message.get("content")) for message in messages), messages


def read_jsonl(path):
    """(text, messages) of each line. ValueError with the line's number for one that is no conversation."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield keyed(parse_line(line, f"{path}, line {number}"))


def parse_line(line, where):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        row = {"messages": exchange(row["prompt"], row["response"])}
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where} has neither "messages", a list, nor "prompt" and "response", two texts')
    check_messages(messages, where)
    return messages


def check_messages(messages, where="it"):
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'{where} has a message without "role" and "content", two texts')
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise ValueError(f"{where} has a text that is not Unicode: it holds half of a surrogate pair")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where} has a message of the unknown role {message.get('role')!r}; the roles are {', '.join(ROLES)}")


# ---------------------------------------------------------------- choosing and splitting

def split_mixture(dataset):
    """[(name, training conversations at most or None)]: "tulu3[train:1000]+smoltalk" has two parts."""
    if Path(str(dataset)).expanduser().is_file():                   # whatever characters its name has
        return [(str(dataset), None)]
    parts = [re.fullmatch(r"\s*(.*?)\s*(?:\[train:(\d+)\])?\s*", part, re.DOTALL).groups() for part in str(dataset).split("+")]
    return [(name, None if limit is None else int(limit)) for name, limit in parts]


def is_chat(dataset):
    """Whether a data set's name means conversations: it, or a part of the mixture, is in CHAT_SETS or ends in .jsonl."""
    return any(name in CHAT_SETS or name.endswith(".jsonl") for name, _ in split_mixture(dataset))


def find_parts(dataset):
    """[(name, start: () -> iterator of (text, messages), share for validation, training conversations at most)] of a mixture."""
    parts = []
    for name, limit in split_mixture(dataset):
        path = Path(name).expanduser()
        if name in CHAT_SETS:
            # Of a part that is small, more: about 200 conversations at least, or a tenth.
            share = VAL_FRACTION if name == "pydocs_chat" else max(STREAM_VAL_FRACTION, min(VAL_FRACTION, 200 / max(limit, 1)) if limit is not None else 0)
            parts.append((name, CHAT_SETS[name], share, limit))
        elif name.endswith(".jsonl") and path.is_file():
            # A tenth of a file, too, and of a file with few lines the one whose hash comes first.
            least = min((hash_fraction(text) for text, _ in read_jsonl(path)), default=None)
            if least is None:
                raise ValueError(f"{path} is empty")
            name = f"{text_sets.file_name(path.resolve().stem)}-{text_sets.short_hash(text_sets.file_digest(path))}"
            parts.append((name, functools.partial(read_jsonl, path), max(VAL_FRACTION, least + 2**-52), limit))
        else:
            raise FileNotFoundError(f"no chat data called {name!r}{text_sets.did_you_mean(name, CHAT_SETS)} (take {', '.join(CHAT_SETS)}, or "
                                    "a .jsonl file; write name[train:1000] for a part of one and name+name for a mixture)")
    return parts


def conversations(parts):
    """(split, messages) of all parts, one after the other."""
    for _, start, val_fraction, limit in parts:
        taken = 0
        for text, messages in start():
            split = "val" if hash_fraction(text) < val_fraction else "train"
            taken += split == "train"
            if limit is not None and taken > limit:
                break
            yield split, messages


# ---------------------------------------------------------------- rendering: where are the responses?

def render(messages, tokenizer):
    """(text of a conversation, [(begin, end) of each response in it]). The text ends where the
    last response does.

    A response begins where the prompt ends that sampling would feed, and ends with what closes its
    turn (<|im_end|>). Where a template rewrites earlier turns (drops what was thought, say), the
    conversation up to one of them is not the beginning of the whole: then the last response counts
    alone.
    """
    check_messages(messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
    if not turns:
        raise ValueError("it has no response")
    messages = messages[:turns[-1] + 1]                             # what nobody answers teaches nothing
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
        raise ValueError("its template does not write a response behind the prompt")
    return whole, spans if len(spans) == len(turns) else spans[-1:]


def find_begin(before, whole, tokenizer, ending):
    """Where the response to the messages `before` begins in the text of the whole conversation;
    None if it has no such place.

    That is behind the prompt. Some prompts end with more than the template writes before an answer
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
    """(what a template writes behind the last answer only, whether that is the header of a next
    answer). roles: a tokenizer's, as pairs.

    Some templates end every conversation with the assistant's header, whether it is asked for or
    not (LLaDA's), some with an end of text (Phi-3's). Most write nothing: ("", False). A small
    conversation and a longer one tell: what follows the answer in both is the end of its turn and
    perhaps the beginning of the next header, with which the whole conversation begins, too.
    """
    user, answer, more = ({"role": role, "content": text} for role, text in
                          (("user", "ask-1"), ("assistant", "reply-1"), ("user", "ask-2")))

    def show(*messages, prompt=False):
        variables = {"tools": None, "documents": None, **dict(roles),
                     "messages": [*messages], "add_generation_prompt": prompt}
        return render_template(template, variables)

    try:
        start = show(user, prompt=True)
        closed = show(user, answer)
        longer = show(user, answer, more)
    except ValueError:
        return "", False
    if not ("reply-1" in closed and "reply-1" in longer):
        return "", False
    closed = closed.rpartition("reply-1")[2]
    longer = longer.rpartition("reply-1")[2]
    if longer.startswith(closed):
        return "", False
    turn_end = closed[:common_length(closed, longer)]
    # The header's part in it: the conversation begins with it, perhaps behind tags like <s>.
    tags = re.match(r"(<[^<>\s]*>|\[[^\[\]\s]*\])*", start)[0]
    places = [0] + [i + 1 for i, character in enumerate(tags) if character in ">]"]
    shared = 0
    for length in range(1, len(turn_end)):
        if any(start.startswith(turn_end[-length:], place) for place in places):
            shared = length
    turn_end = turn_end[:len(turn_end) - shared]
    turn_end = re.sub(r"(<[^<>\s]*|\[[^\[\]\s]*)$", "", turn_end)    # nor does it end inside a tag
    ending = closed[len(turn_end):]
    is_header = start.endswith(ending)
    return (ending, is_header) if turn_end or is_header else ("", False)


def common_length(a, b):
    """How many characters two texts have in common at their beginning."""
    return len(os.path.commonprefix([a, b]))


def encode_rendered(rendered, tokenizer):
    """Yields (ids, mask) for each (text, spans): list of int and as many uint8, 1 in a response.

    The prompt's ids are those that sampling will feed. The whole is encoded at once where its tokens end at each border; else,
    as BPE may merge across one, piece by piece.
    """
    cuts = [[border for span in spans for border in span][:-1] for _, spans in rendered]
    texts = [text[:cut] for (text, _), borders in zip(rendered, cuts) for cut in (*borders, None)]
    # The template writes control tokens; but nobody's words become a mask.
    encode = functools.partial(tokenizer.encode_batch, parse_special=True, parse_mask=False)
    encoded = iter(encode(texts))
    for (text, _), borders in zip(rendered, cuts):
        *parts, ids = [next(encoded) for _ in (*borders, None)]
        if any(ids[:len(part)] != part for part in parts):
            pieces = [text[begin:end] for begin, end in zip([0, *borders], [*borders, None])]
            pieces = encode(pieces)
            ids, ends = sum(pieces, []), np.cumsum([len(piece) for piece in pieces])
        else:
            ends = [*map(len, parts), len(ids)]
        mask = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in zip(ends[::2], ends[1::2]):
            mask[begin:end] = 1
        yield ids, mask


# ---------------------------------------------------------------- writing

class ChatWriter(TokenWriter):
    """A TokenWriter that marks the responses and knows where conversations begin."""

    def __init__(self, folder, split, vocab_size):
        super().__init__(folder / f"{split}.bin", vocab_size)
        self.mask, self.index = ((folder / f"{split}.{name}").open("wb") for name in ("mask", "index"))

    def add(self, text, ids, mask):
        self.index.write(np.array([self.tokens, len(ids), mask.argmax()], dtype="<i8").tobytes())
        self.mask.write(mask.tobytes())
        self.hash.update(mask.tobytes())
        self.write(text, ids)
        self.documents += 1

    def close(self):
        self.mask.close()
        self.index.close()
        super().close()


def write_conversations(folder, rows, tokenizer, facts):
    """Fill a folder with conversations, (split, messages). What a template refuses, or has no response, is left out and counted."""
    from tqdm import tqdm

    writers, left_out, waiting = {split: ChatWriter(folder, split, tokenizer.vocab_size) for split in SPLITS}, {}, []

    def flush():
        encoded = encode_rendered([rendered for _, rendered in waiting], tokenizer)
        for (split, (text, _)), (ids, mask) in zip(waiting, encoded):
            writers[split].add(text, ids, mask)
        waiting.clear()

    for split, messages in tqdm(rows, desc="conversations", unit="", unit_scale=True, delay=2, disable=None):
        try:
            waiting.append((split, render(messages, tokenizer)))
        except ValueError as error:
            left_out[str(error)] = left_out.get(str(error), 0) + 1
        if len(waiting) == BATCH:
            flush()
    flush()
    for writer in writers.values():
        writer.close()
    if left_out and not any(writer.documents for writer in writers.values()):
        raise ValueError(f"{facts['source']} has no conversation to learn from: {max(left_out, key=left_out.get)}")
    text_sets.write_meta(folder, writers, tokenizer, facts | {"left_out": left_out})


def prepare_chat(dataset, tokenizer, root=None, vocab_size=2048):
    """The folder (a Path) of prepared conversations, for ChatDataset and Tokenizer.from_pretrained; made if need be.

    dataset: see above. tokenizer: a Tokenizer with its chat template, or whatever data.prepare.prepare takes. Raises ValueError
    (a broken line, an unknown role, no responses), FileNotFoundError or another OSError (off-line).
    """
    parts = find_parts(dataset)
    tokenizer_name, tokenizer = text_sets.find_tokenizer(tokenizer, vocab_size)
    name = text_sets.file_name("+".join(part[0] + (f"-{part[3]}" if part[3] is not None else "") for part in parts))
    if tokenizer != "bpe":
        tokenizer.note_missing_template()
        tokenizer.add_chat_tokens()
        # The template is the tokenizer's as much as its vocabulary is.
        tokenizer_name = text_sets.short_hash(f"{tokenizer.backend.to_str()}{tokenizer.chat_templates}".encode())
    folder = text_sets.prepared_root(root) / f"{name}-{tokenizer_name}"

    def fill(temporary):
        rows, learned = conversations(parts), tokenizer
        facts = {"name": name, "source": str(dataset), "tokenizer": tokenizer_name,
                 "rendering": RENDERING}
        if tokenizer == "bpe":
            rows = list(rows)           # a mixture that is streamed comes with the tokenizer of a checkpoint
            learned = Tokenizer.train((m["content"] for split, messages in rows if split == "train" for m in messages), vocab_size)
        write_conversations(temporary, rows, learned, facts)

    return folder if is_prepared(folder) else text_sets.make_dataset(folder, fill, is_prepared)


def is_prepared(folder):
    try:
        data = ChatDataset(folder, seq_len=2**40, padding="hidden")
        Tokenizer.from_pretrained(folder)
    except (FileNotFoundError, ValueError):
        return False
    return data.meta.get("rendering") == RENDERING


# ---------------------------------------------------------------- reading

@dataclass
class ChatBatch:
    """What a training step reads; of text, tokens alone."""
    tokens: torch.Tensor                    # int64 [B, T]
    maskable: torch.Tensor = None           # bool [B, T]: may be masked and is counted; None: everything
    attention_mask: torch.Tensor = None     # bool [B, T]: what is no padding; None: everything is to be seen
    share: float = 1.0                      # its counted tokens over the mean of the step's slices: times this, means per token add up

    def spread(self, n):
        """n of its rows, evenly spread."""
        rows = torch.linspace(0, len(self.tokens) - 1, min(n, len(self.tokens))).long()
        return ChatBatch(*(None if x is None else x[rows] for x in (self.tokens, self.maskable, self.attention_mask)))

    def to(self, device):
        moved = (None if x is None else x.to(device) for x in (self.tokens, self.maskable, self.attention_mask))
        return ChatBatch(*moved, self.share)


def open_dataset(dataset, folder, seq_len, padding="eos", block_length=0):
    """The ChatDataset or, of text, the TextDataset in a folder that `prepare(dataset, ...)` made: one interface for both."""
    return ChatDataset(folder, seq_len, padding, block_length) if is_chat(dataset) else TextDataset(folder, seq_len)


class TextDataset(TokenDataset):
    """Prepared text as windows of seq_len tokens, with the methods and attributes of ChatDataset."""

    def __init__(self, folder, seq_len):
        super().__init__(folder)
        self.seq_len = seq_len
        self.examples = {split: max(1, len(getattr(self, split)) // seq_len) for split in SPLITS}

    def batch(self, split, batch_size, seed, step, rank=0, world_size=1):
        return ChatBatch(super().batch(split, batch_size, self.seq_len, seed, step, rank, world_size))

    def val_batch(self, max_examples=None):
        return ChatBatch(self.windows("val", self.seq_len, None if max_examples is None else max_examples * self.seq_len))

    def val_bytes_per_token(self, batch, tokenizer):
        return self.bytes_per_token("val")

    def prompt(self, split, number):
        return [], []

    def summary(self):
        return f"{len(self.train):,} training tokens in windows of {self.seq_len}"


class ChatDataset(TokenDataset):
    """Prepared conversations; attributes as TokenDataset has them, and for each split in a dict `examples`, `truncated` (longer than
    seq_len: cut) and `dropped` (the prompt alone fills seq_len: not used), the numbers of conversations.

    padding       "eos": a response ends in end-of-text tokens up to the end of the batch, which are part of it, may be masked and
                  are learned. So the model finds out how long an answer is, for sampling begins with more masks than are needed
                  (LLaDA, arXiv 2502.09992, appendix B.1). "hidden": nobody sees the padding; cheaper in tokens to learn, but the
                  model never says where an answer ends in a row of masks.
    block_length  divides the length of every batch.
    Raises FileNotFoundError and ValueError for a folder that is missing or damaged, and for settings that do not fit.
    """

    def __init__(self, folder, seq_len, padding="eos", block_length=0):
        super().__init__(folder)
        if padding not in ("eos", "hidden"):
            raise ValueError(f"padding must be eos or hidden, got {padding!r}")
        if padding == "eos" and self.eos_token_id is None:
            raise ValueError(f"the tokenizer of {folder} has no end-of-text token to pad with: take padding=hidden")
        if block_length and seq_len % block_length:
            raise ValueError(f"block_length {block_length} does not divide seq_len {seq_len}")
        self.seq_len, self.padding = seq_len, padding
        self.multiple = block_length * -(-32 // block_length) if block_length else 32       # of T: few shapes, and whole blocks
        self.masks, self.index, self.kept, self.examples, self.truncated, self.dropped = {}, {}, {}, {}, {}, {}
        for split in SPLITS:
            self.masks[split], self.index[split] = self._open(split)
            length, first = self.index[split][:, 1], self.index[split][:, 2]
            self.kept[split] = np.flatnonzero(first < seq_len)
            self.examples[split], self.dropped[split] = len(length), int((first >= seq_len).sum())
            self.truncated[split] = int(((first < seq_len) & (length > seq_len)).sum())
            if not len(self.kept[split]):
                raise ValueError(f"the prompts of all {len(length)} {split} conversations fill the context of {seq_len} tokens: take a larger seq_len")
        self._step_rows = functools.lru_cache(maxsize=2)(self._epoch)
        self._step_batch = functools.lru_cache(maxsize=2)(self._step)

    def _open(self, split):
        ids, again = getattr(self, split), f"delete {self.folder} and prepare it again"
        for name in ("mask", "index"):
            if not (self.folder / f"{split}.{name}").is_file():
                raise FileNotFoundError(f"{self.folder / split}.{name} is missing, so these are no conversations: {again}")
        sizes = [(self.folder / f"{split}.{name}").stat().st_size for name in ("mask", "index")]
        if sizes == [len(ids), 24 * self.meta["documents"][split]]:
            mask, index = (np.memmap(self.folder / f"{split}.{name}", dtype, mode="r") for name, dtype in (("mask", np.uint8), ("index", "<i8")))
            index = index.reshape(-1, 3)
            if index[-1, :2].sum() == len(ids):
                return mask, index
        raise ValueError(f"{self.folder}: {split}.bin, {split}.mask and {split}.index do not belong together: {again}")

    def batch(self, split, batch_size, seed, step, rank=0, world_size=1):
        """The ChatBatch that `rank` of `world_size` sees at `step`; rank and world_size as in TokenDataset.batch.

        An epoch visits every conversation once (up to what is left of a step), in a random order of steps; T is the same for all
        ranks of a step, the longest conversation of it rounded up, at most seq_len.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} but world_size {world_size}: pass the number of slices of a step")
        whole = self._step_batch(split, batch_size * world_size, seed, step)
        rows = slice(rank * batch_size, (rank + 1) * batch_size)
        share = whole.maskable[rows].sum().item() * world_size / whole.maskable.sum().item()
        attention_mask = None if whole.attention_mask is None else whole.attention_mask[rows]
        return ChatBatch(whole.tokens[rows], whole.maskable[rows], attention_mask, share)

    def val_batch(self, max_examples=None):
        """Conversations evenly spread over the validation split, where a mixture stands part after part, the shortest first. For diffusion.nelbo:
        padding is hidden and only what was answered counts, so that the figure does not depend on how batches are put together."""
        kept = self.kept["val"]
        rows = kept[np.linspace(0, len(kept) - 1, min(len(kept), max_examples or len(kept))).round().astype(np.int64)]
        return self._collate("val", rows[np.argsort(self.index["val"][rows, 1], kind="stable")], "hidden")

    def val_bytes_per_token(self, batch, tokenizer):
        """UTF-8 bytes of the answers in a `val_batch` per token that counts."""
        answers = (tokenizer.decode(row[given], skip_special_tokens=True) for row, given in zip(batch.tokens, batch.maskable))
        return sum(len(answer.encode()) for answer in answers) / batch.maskable.sum().item()

    def summary(self):
        """What training will not see, in a line."""
        return (f"{self.examples['train']:,} conversations, {self.truncated['train']:,} of them cut at {self.seq_len} tokens, {self.dropped['train']:,} "
                f"dropped whose prompt alone is that long, {sum(self.meta['left_out'].values()):,} left out without an answer")

    def prompt(self, split, number):
        """(tokens before the first response, tokens of it and of what follows) of the n-th conversation that is kept: two lists."""
        start, length, first = self.index[split][self.kept[split][number % len(self.kept[split])]]
        ids = getattr(self, split)[start:start + length].tolist()
        return ids[:first], ids[first:]

    def _epoch(self, split, per_step, seed, epoch):
        """int64 [steps, per_step]: the conversations of each step of an epoch."""
        rng, kept = np.random.default_rng((SPLITS.index(split), seed % 2**64, epoch)), self.kept[split]
        steps = max(1, len(kept) // per_step)
        order = np.resize(rng.permutation(kept), steps * per_step)          # repeats where there are too few for one step
        length = self.index[split][:, 1]
        for start in range(0, len(order), POOL * per_step):
            pool = order[start:start + POOL * per_step]
            order[start:start + POOL * per_step] = pool[np.argsort(length[pool], kind="stable")]
        return order.reshape(steps, per_step)[rng.permutation(steps)]

    def _step(self, split, per_step, seed, step):
        epoch, step = divmod(step, max(1, len(self.kept[split]) // per_step))
        return self._collate(split, self._step_rows(split, per_step, seed, epoch)[step], self.padding)

    def _collate(self, split, rows, padding):
        index = self.index[split][rows]                                     # [B, 3]
        lengths = np.minimum(index[:, 1], self.seq_len)
        T = min(-(-int(lengths.max()) // self.multiple) * self.multiple, self.seq_len)
        fill = 0 if self.eos_token_id is None else self.eos_token_id
        tokens, maskable = np.full((len(rows), T), fill, dtype=np.int64), np.full((len(rows), T), padding == "eos")
        for row, (start, length) in enumerate(zip(index[:, 0], lengths)):
            tokens[row, :length] = getattr(self, split)[start:start + length]
            maskable[row, :length] = self.masks[split][start:start + length]
        shown = torch.from_numpy(np.arange(T) < lengths[:, None]) if padding == "hidden" else None
        return ChatBatch(torch.from_numpy(tokens), torch.from_numpy(maskable), shown)
