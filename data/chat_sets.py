"""Where conversations come from: published sets, .jsonl files, mixtures of them.

A data set is a name of CHAT_SETS, a .jsonl file, or selfmade: and a checkpoint, which then writes
the answers to our prompts (selfmade.py); several are mixed by +, and [train:1000] takes
the first thousand for training:

    tulu3[train:50000]+smoltalk    pydocs_chat    mine.jsonl+alpaca    selfmade:smollm2
    gym:chain_sum

A line of a .jsonl file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
...}, ...]} or {"prompt": "...", "response": "..."}. gym:NAME is a task of the package
reasoning-gym, see gym.py.

Each set yields (key, messages); the key is the text whose hash decides the split.
"""
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import gym
from data.files import (
    VAL_FRACTION,
    did_you_mean,
    file_digest,
    file_name,
    hash_fraction,
    short_hash,
    shuffled,
)
from data.hub import stream_rows
from data.python_docs import docstrings
from data.selfmade import answers_file, is_selfmade, parse_request
from data.selfmade import conversations as own_answers
from data.tales_chat import conversations_about_tales

ROLES = ("system", "user", "assistant")
TENTH_HELD_OUT = ("tales_chat", "pydocs_chat", "gsm8k")
STREAM_VAL_FRACTION = 0.005     # of a streamed set
ENOUGH_FOR_VALIDATION = 200     # conversations
LOOK_AHEAD = 10_000     # training conversations past a limit, in search of one for validation
GYM_CONVERSATIONS = 20_000      # of a task of reasoning-gym, unless [train:1000] says otherwise

# The configurations of OpenCoder's two stages that are instructions.
OPC = {
    "OpenCoder-LLM/opc-sft-stage1": ("filtered_infinity_instruct", "largescale_diverse_instruct",
                                     "realuser_instruct"),
    "OpenCoder-LLM/opc-sft-stage2": ("educational_instruct", "evol_instruct", "mceval_instruct",
                                     "package_instruct"),
}

# --------------------------------------------------------------------------------------------------
# The sets


def pydocs_chat():
    """what is this signature of Python's library for? Its docstring: 2 MB, embedded"""
    documents = {f"{signature}\n{text}": (signature, text) for signature, text in docstrings()}
    for document in shuffled(documents):        # the same documents are held out here and in pydocs
        signature, text = documents[document]
        yield document, exchange(question(signature), text)


def question(signature):
    """One of a few ways to ask what a signature is for, chosen by its hash."""
    thing = "function"
    for keyword in ("module", "class"):
        if signature.startswith(f"{keyword} "):
            thing = keyword
    name = re.match(r"(?:async def|def|class|module) ([\w.]+)", signature)[1]
    ways = (f"What does this {thing} do?\n{signature}",
            f"Write a docstring for\n{signature}",
            f"Explain {signature}",
            f"What is the {thing} {name} for?\n{signature}")
    return ways[int(hash_fraction(signature) * len(ways))]


def tales_chat():
    """questions about short tales, and requests for some: 4 MB, embedded"""
    for turns in conversations_about_tales():
        messages = []
        for prompt, response in turns:
            messages += exchange(prompt, response)
        yield keyed(messages)


def alpaca():
    """Stanford Alpaca, 52,000 instructions and answers: streamed"""
    for row in stream_rows("tatsu-lab/alpaca"):
        prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        yield keyed(exchange(prompt, row["output"]))


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
    for repository, names in OPC.items():
        for name in names:
            for row in stream_rows(repository, name=name):
                if "python" in (row["output"] or ""):
                    yield keyed(exchange(row["instruction"], row["output"]))


def gsm8k():
    """GSM8K, 7,473 questions of school mathematics, worked out: streamed"""
    for row in stream_rows("openai/gsm8k", name="main"):
        # The key of the task in tasks.py: what is held out there is held out here.
        key = f"{row['question']}\n{gsm8k_number(row)}"
        yield key, exchange(row["question"], row["answer"])


def gsm8k_number(row):
    """The number that an answer of GSM8K ends with, after ####."""
    return row["answer"].rpartition("####")[2].strip().replace(",", "")


CHAT_SETS = {
    "tales_chat": tales_chat,
    "pydocs_chat": pydocs_chat,
    "alpaca": alpaca,
    "tulu3": tulu3,
    "smoltalk": smoltalk,
    "opc": opc,
    "gsm8k": gsm8k,
}


def selfmade(request, path):
    """What a checkpoint answers to our prompts, read from the file `path` or written now."""
    for prompt, response in own_answers(request, path):
        yield prompt, exchange(prompt, response)


def exchange(prompt, response):
    """The messages of one question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def keyed(messages):
    """(text that decides the split, messages)"""
    return "\n".join(str(message.get("content")) for message in messages), messages


# --------------------------------------------------------------------------------------------------
# .jsonl files


def read_jsonl(path):
    """(key, messages) of each line. ValueError with the line's number for one that is no
    conversation."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield keyed(parse_line(line, f"{path}, line {number}"))


def parse_line(line, where):
    """The messages of a line, bytes; `where` names it in errors."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(row, dict):
        row = {}
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        return checked(exchange(row["prompt"], row["response"]), where)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        hint = ""
        if isinstance(row.get("text"), str):            # as many data sets of plain text have it
            hint = ": a .jsonl holds conversations, plain texts go into .txt files"
        raise ValueError(f'{where} has neither "messages", a list, nor "prompt" and "response", '
                         f"two texts{hint}")
    return checked(messages, where)


def checked(messages, where="it"):
    """The messages. ValueError for one that is none, or whose role nobody knows."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'{where} has a message without "role" and "content", two texts')
        if re.search("[\ud800-\udfff]", message["content"]):
            raise ValueError(f"{where} has a text that is not Unicode: it holds half of a "
                             "surrogate pair")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where} has a message of the unknown role {message.get('role')!r}; "
                             f"the roles are {', '.join(ROLES)}")
    return messages


# --------------------------------------------------------------------------------------------------
# Mixtures


@dataclass
class Part:
    """One of the sets of a mixture."""
    name: str
    read: Callable              # read() gives an iterator of (key, messages)
    val_fraction: float         # share of it for validation
    limit: int | None = None    # training conversations at most

    def label(self):
        """The part in the name of a prepared folder."""
        return self.name if self.limit is None else f"{self.name}-{self.limit}"


def is_chat(dataset):
    """Whether a data set's name means conversations: it, or a part of the mixture, is in CHAT_SETS,
    a task of reasoning-gym, ends in .jsonl or is selfmade."""
    for name, _ in split_mixture(dataset):
        if name in CHAT_SETS or name.startswith(gym.PREFIX) or name.endswith(".jsonl"):
            return True
        if is_selfmade(name):
            return True
    return False


def split_mixture(dataset):
    """[(name, training conversations at most or None)]: "tulu3[train:1000]+smoltalk" has two
    parts."""
    dataset = str(dataset)
    if Path(dataset).expanduser().is_file():            # whatever characters its name has
        return [(dataset, None)]
    parts = []
    for part in dataset.split("+"):
        pattern = r"\s*(.*?)\s*(?:\[train:(\d+)\])?\s*"
        name, limit = re.fullmatch(pattern, part, re.DOTALL).groups()
        parts.append((name, None if limit is None else int(limit)))
    return parts


def find_parts(dataset, root):
    """The Parts of a mixture. root: where prepared data sets are kept. FileNotFoundError for a name
    that nobody knows."""
    return [find_part(name, limit, root) for name, limit in split_mixture(dataset)]


def find_part(name, limit, root):
    """The Part of a mixture that has this name."""
    path = Path(name).expanduser()
    if is_selfmade(name):
        request = parse_request(name)
        path = answers_file(request, root)
        return Part(path.stem, functools.partial(selfmade, request, path), VAL_FRACTION, limit)
    if name in CHAT_SETS:
        return Part(name, CHAT_SETS[name], published_val_fraction(name, limit), limit)
    if name.startswith(gym.PREFIX):
        label = file_name(gym.Gym(name).label())
        read = functools.partial(gym.conversations, name)
        count = GYM_CONVERSATIONS if limit is None else limit
        return Part(label, read, VAL_FRACTION, count)
    if name.endswith(".jsonl") and path.is_file():
        label = f"{file_name(path.resolve().stem)}-{short_hash(file_digest(path))}"
        read = functools.partial(read_jsonl, path)
        return Part(label, read, jsonl_val_fraction(path), limit)
    raise FileNotFoundError(f"no chat data called {name!r}{did_you_mean(name, CHAT_SETS)} (take "
                            f"{', '.join(CHAT_SETS)}, gym:NAME or a .jsonl file; write "
                            "name[train:1000] for a part of one and name+name for a mixture)")


def published_val_fraction(name, limit):
    """The share for validation of a published set: a tenth of a small one; of a small part of a
    large one more than else, up to a tenth."""
    if name in TENTH_HELD_OUT:
        return VAL_FRACTION
    if limit is None:
        return STREAM_VAL_FRACTION
    enough = min(VAL_FRACTION, ENOUGH_FOR_VALIDATION / max(limit, 1))
    return max(STREAM_VAL_FRACTION, enough)


def jsonl_val_fraction(path):
    """The share for validation of a file: a tenth, and of a file with few lines enough for the one
    whose hash comes first."""
    keys = [key for key, _ in read_jsonl(path)]
    if not keys:
        raise ValueError(f"{path} is empty")
    return enough_for_validation(keys)


def enough_for_validation(keys):
    """A tenth, and of a few keys enough for the one whose hash comes first."""
    return max(VAL_FRACTION, min(map(hash_fraction, keys)) + 2**-52)


def conversations(parts):
    """(split, messages) of all parts, one after the other. A part that has reached its limit goes
    on until it has given something to validation."""
    for part in parts:
        taken, held_out = 0, 0
        for key, messages in part.read():
            split = "val" if hash_fraction(key) < part.val_fraction else "train"
            if split == "val":
                held_out += 1
            else:
                taken += 1
            if split == "train" and part.limit is not None and taken > part.limit:
                if held_out or taken > part.limit + LOOK_AHEAD:
                    break
                continue
            yield split, messages
