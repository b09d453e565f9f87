"""OpenAI's API without its transport: what a request asks for, and its answer in OpenAI's shape.

Besides OpenAI's fields a request may set the sampler's, SAMPLER_FIELDS, which mean what they do in
sample.py. A `suffix`, or [MASK] in a prompt, asks for infilling.
"""
import json
import time
import uuid

from sampling.worker import MAX_BATCH, Job, Refusal

MAX_STEPS = 10_000

SAMPLER_FIELDS = {
    "steps": int, "block_length": int, "temperature": float, "top_p": float, "top_k": int,
    "remasking": str, "alg_temp": float, "threshold": float, "edit_threshold": float,
    "factor": float, "entropy_bound": float, "remask": float, "remask_schedule": str,
    "suppress": str, "defer": str, "cache": str, "cfg_scale": float, "schedule": str,
    "seed": int}
COMMON_FIELDS = {"model", "max_tokens", "n", "stop", "stream", "stream_options", "user",
                 "metadata", "store", "service_tier", *SAMPLER_FIELDS}
# OpenAI's fields that exist here with one value only, which clients may well send.
NEUTRAL = {
    "frequency_penalty": [0], "presence_penalty": [0], "best_of": [1], "logprobs": [False],
    "top_logprobs": [0], "logit_bias": [{}], "tools": [[]], "functions": [[]],
    "tool_choice": ["none", "auto"], "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}], "modalities": [["text"]]}
KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false",
         list: "a list", dict: "an object"}


# --------------------------------------------------------------------------------------------------
# Reading a request. All of these raise Refusal.


def get(body, name, kind, default=None):
    """body[name], which must be of this kind; `default` where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    allowed = (int, float) if kind is float else kind
    is_bool = isinstance(value, bool)                   # which Python takes for an int
    if is_bool and kind is not bool or not isinstance(value, allowed):
        raise Refusal(400, f"{name} must be {KINDS[kind]}, got {json.dumps(value)[:80]}", name)
    if kind is float and not abs(value) < 1e30:
        raise Refusal(400, f"{name} is out of range", name)
    return value


def check_names(body, known):
    for name, value in body.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise Refusal(400, f"{name} is not supported here", name)
        if name not in known and name not in NEUTRAL:
            raise Refusal(400, f"unrecognized request argument: {name[:80]}", name[:80])


def read_settings(body, settings):
    """The sampler settings of a request: its own, and for the rest those that sample.py was started
    with; but without a seed of its own it gets another text each time."""
    own = {**settings, "seed": None}
    for name, kind in SAMPLER_FIELDS.items():
        value = get(body, name, kind)
        if value is not None:
            own[name] = value
    if own["steps"] > MAX_STEPS:
        raise Refusal(400, f"steps must be at most {MAX_STEPS}, got {own['steps']}", "steps")
    return own


def read_stops(body):
    if isinstance(body.get("stop"), str):
        stops = [body["stop"]]
    else:
        stops = get(body, "stop", list, [])
    if len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refusal(400, "stop must be a string or a list of up to four strings", "stop")
    return stops


def read_messages(body):
    """[{"role": ..., "content": text}, ...] of a chat request; a content may be a list of text
    parts."""
    messages = []
    for message in get(body, "messages", list, []):
        roles = ("system", "developer", "user", "assistant")
        if not isinstance(message, dict) or message.get("role") not in roles:
            raise Refusal(400, f"each message needs a role: {', '.join(roles)}", "messages")
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({"role": role, "content": read_content(message.get("content"))})
    if not messages:
        raise Refusal(400, "messages must be a list of at least one message", "messages")
    return messages


def read_content(content):
    texts = content if isinstance(content, list) else [{"text": content}]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in texts):
        raise Refusal(400, "the content of a message must be text", "messages")
    return "".join(part["text"] for part in texts)


def read_prompts(sampler, body):
    """The prompts of a completion, each a text or a list of tokens."""
    prompts = body.get("prompt")
    if prompts is None:
        prompts = ""
    is_list = isinstance(prompts, list)
    if not is_list or not any(isinstance(prompt, str | list) for prompt in prompts):
        prompts = [prompts]                             # a text, or one list of tokens
    for prompt in prompts:
        if not isinstance(prompt, str) and not is_token_list(sampler, prompt):
            raise Refusal(400, "prompt must be a text, a list of tokens, or a list of such",
                          "prompt")
    return prompts


def is_token_list(sampler, prompt):
    size = sampler.config.vocab_size
    return isinstance(prompt, list) and all(type(t) is int and 0 <= t < size for t in prompt)


# --------------------------------------------------------------------------------------------------
# Request -> Job


def make_job(sampler, settings, body, prompts, chat=False, suffix="", watched=False):
    """(Job, [(first, end) position of the answer in each row]) for prompts: texts or lists of
    tokens, each of them n times."""
    own, n = read_settings(body, settings), get(body, "n", int, 1)
    asked = get(body, "max_tokens", int)
    if n < 1:
        raise Refusal(400, f"n must be at least 1, got {n}", "n")
    if asked is not None and asked < 1:
        raise Refusal(400, f"max_tokens must be at least 1, got {asked}", "max_tokens")
    if n * len(prompts) > MAX_BATCH:
        raise Refusal(400, f"{n * len(prompts)} answers asked for, {MAX_BATCH} are possible in one "
                      "request", "n")
    has_gaps = any(isinstance(prompt, str) and sampler.has_gaps(prompt) for prompt in prompts)
    if has_gaps and not chat and not suffix:
        gaps = True
        rows, spans, count = rows_with_gaps(sampler, prompts)
    else:
        gaps = bool(suffix)
        new_tokens = asked or settings["max_new_tokens"]
        rows, spans, count = rows_to_continue(sampler, prompts, suffix, new_tokens)
    if not body.get("block_length"):    # the server's own setting must not forbid short answers
        own["block_length"] = min(own["block_length"], count)
    arguments = sampler.arguments(count, own, gaps, chat)
    rows = [row for row in rows for _ in range(n)]
    spans = [span for span in spans for _ in range(n)]
    return Job(rows, arguments, gaps, watched, chat), spans


def rows_with_gaps(sampler, prompts):
    """(rows of tokens with masks, spans of the answers, the most masks of a row) of texts with
    [MASK] in them."""
    rows = []
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else sampler.tokenizer.decode(prompt)
        rows.append(sampler.encode_gaps(text))
    longest, context = max(map(len, rows)), sampler.config.max_len
    if longest > context:
        raise Refusal(400, f"{longest} tokens exceed the context of {context}",
                      code="context_length_exceeded")
    count = max(row.count(sampler.mask_id) for row in rows)
    return rows, [(0, len(row)) for row in rows], count


def rows_to_continue(sampler, prompts, suffix, new_tokens):
    """(rows of tokens, spans of the answers, new tokens: as `Sampler.fit` has it). With a suffix
    the masks stand in the rows, before it."""
    rows, after = [], []
    for prompt in prompts:
        if isinstance(prompt, str):
            rows.append(sampler.encode_prompt(prompt))
        else:
            rows.append(prompt or list(sampler.opening))
    if suffix:
        after = sampler.tokenizer.encode(suffix) + sampler.tail
    try:
        count = min(sampler.fit(row + after, new_tokens) for row in rows)
    except ValueError as error:
        raise Refusal(400, str(error), "max_tokens", "context_length_exceeded") from None
    spans = [(len(row), len(row) + count) for row in rows]
    if suffix:
        rows = [row + [sampler.mask_id] * count + after for row in rows]
    return rows, spans, count


# --------------------------------------------------------------------------------------------------
# Tokens -> answer


def answer_text(sampler, tokens, stops, job, final=True, before=()):
    """(text, tokens used, finish_reason or None) of the tokens of an answer, all of them or, not
    `final`, the first ones. before: the tokens of a text that it continues."""
    if job.gaps:
        text = sampler.tokenizer.decode(tokens, skip_special_tokens=True)
        used, ended = len(tokens), True
    else:
        text, used, ended = sampler.decode(tokens, job.chat)
    text, stopped = sampler.cut_at_special(tokens[:used + 1], text, stops)
    text = sampler.continued(list(before), tokens, text)
    places = [text.index(stop) for stop in stops if stop in text]
    if places:
        return text[:min(places)], used, "stop"
    if ended or stopped:
        return text, used, "stop"
    if final:
        return text, used, "length"
    # What may still change is held back: half a character, half a stop string.
    text, longest = text.rstrip("\ufffd"), max(map(len, stops), default=1)
    return text[:len(text) - longest + 1], used, None


class Completion:
    """A request to /v1/completions or, `chat`, /v1/chat/completions, and its answer: `whole`, or in
    chunks as the text is finished from the left on."""

    def __init__(self, sampler, settings, body, prompts, before, chat=False, suffix=""):
        """before: for each prompt the text that its answers repeat. Raises Refusal."""
        self.sampler, self.chat = sampler, chat
        self.stream, self.stops = get(body, "stream", bool, False), read_stops(body)
        options = get(body, "stream_options", dict, {})
        self.include_usage = get(options, "include_usage", bool, False)
        get(body, "model", str)                         # any name will do: there is one model
        self.job, self.spans = make_job(
            sampler, settings, body, prompts, chat, suffix, watched=self.stream)
        self.n = len(self.spans) // len(prompts)        # answers to each prompt
        self.before = [text for text in before for _ in range(self.n)]
        self.sent = [""] * len(self.spans)
        kind, prefix = "text_completion", "cmpl"
        if chat:
            kind, prefix = "chat.completion", "chatcmpl"
            if self.stream:
                kind = "chat.completion.chunk"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex[:24]}", "created": int(time.time()),
                     "model": sampler.name, "object": kind}

    def answers(self):
        """[(text, tokens used, finish_reason), ...] when the job is done."""
        return [self.answer(row, *span) for row, span in zip(self.job.result, self.spans)]

    def answer(self, row, first, end, final=True):
        """`answer_text` of a row whose answer stands from `first` to `end`. An answer in a chat
        begins anew."""
        before = () if self.chat else row[max(first - 8, 0):first]      # the last ones tell all
        return answer_text(self.sampler, row[first:end], self.stops, self.job, final, before)

    def usage(self, answers):
        """What was given is a prompt's, wherever its gaps stand, and what fills them is written."""
        gaps = [row.count(self.sampler.mask_id) for row in self.job.sequences]
        lengths = [len(row) for row in self.job.sequences]
        given = sum(lengths[::self.n]) - sum(gaps[::self.n])
        used = sum(gaps) if self.job.gaps else sum(count for _, count, _ in answers)
        return {"prompt_tokens": given, "completion_tokens": used, "total_tokens": given + used}

    def whole(self):
        """The answer in one piece."""
        answers, choices = self.answers(), []
        for i, (text, _, reason) in enumerate(answers):
            choice = {"index": i, "logprobs": None, "finish_reason": reason}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = self.before[i] + text
            choices.append(choice)
        return {**self.head, "choices": choices, "usage": self.usage(answers)}

    def chunk(self, index, text, reason=None, first=False):
        choice = {"index": index, "logprobs": None, "finish_reason": reason}
        if not self.chat:
            choice["text"] = text
        else:
            choice["delta"] = {}
            if first:
                choice["delta"]["role"] = "assistant"
            if text or first:
                choice["delta"]["content"] = text
        return {**self.head, "choices": [choice]}

    def chunks(self, message, done):
        """What to send for an event of the job: a message of its Trace and each row's finished
        tokens."""
        if "rows" in message:
            for i, text in enumerate(self.before):
                yield self.chunk(i, text, first=True)
        for i, span in enumerate(self.spans):
            text, _, _ = self.answer(done[i], *span, final=False)
            if len(text) > len(self.sent[i]) and text.startswith(self.sent[i]):
                yield self.chunk(i, text[len(self.sent[i]):])
                self.sent[i] = text

    def last_chunks(self):
        """The rest of each answer, with its reason to end there."""
        answers = self.answers()
        for i, (text, _, reason) in enumerate(answers):
            rest = text.removeprefix(self.sent[i]) if text.startswith(self.sent[i]) else ""
            yield self.chunk(i, rest, reason)
        if self.include_usage:
            yield {**self.head, "choices": [], "usage": self.usage(answers)}
