"""A conversation in the terminal, in the checkpoint's own chat format."""
import sys

import kernels
from common import seed_for
from sampling.terminal import Terminal, printable
from sampling.trace import Trace


def converse(sampler, settings):
    """Read questions until the end of the input and answer them; settings: the constants of
    sample.py by name."""
    sampler.tokenizer.note_missing_template()
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401  arrow keys and history for input()
        print("Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D leaves.")
    messages = []
    with kernels.packed(sampler.model):                 # once, and not for every answer
        while True:
            try:
                line = input("\n> " if typed else "").strip()
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                continue
            except EOFError:
                break
            if line == "/exit":
                break
            if line == "/reset":
                messages = []
                print("(forgotten)")
            elif line:
                reply(sampler, settings, messages, line)


def reply(sampler, settings, messages, question):
    """Answer a question. One that is stopped, or cannot be answered, is forgotten."""
    messages.append({"role": "user", "content": question})
    try:
        answer(sampler, settings, messages)
    except KeyboardInterrupt:
        messages.pop()
        print("\n(stopped; the question is forgotten)")
    except ValueError as error:
        messages.pop()
        print(f"error: {error}")


def answer(sampler, settings, messages):
    """Print the answer to the last of the messages and append it."""
    tokens = encode_what_fits(sampler, settings, messages)
    count = sampler.fit(tokens, settings["max_new_tokens"])
    block_length = min(settings["block_length"], count)
    seed = seed_for("turn of a chat", settings["seed"], len(messages))
    turn = {**settings, "seed": seed, "block_length": block_length}
    arguments = sampler.arguments(count, turn, chat=True)
    terminal = Terminal(begin=len(tokens), pause=settings["pause"])
    watched = settings["show"] or terminal.in_place
    trace = Trace(sampler, arguments["remasking"], terminal.draw if watched else None)
    try:
        [row] = sampler.run([tokens], arguments, on_step=trace)
    finally:
        terminal.clear()
    completion = row[len(tokens):]
    text, _, _ = sampler.decode(completion, chat=True)
    print(printable(text.strip()))
    print(f"({trace.report(len(completion))})")
    messages.append({"role": "assistant", "content": text.strip()})


def encode_what_fits(sampler, settings, messages):
    """The tokens of the conversation. Its oldest turns are dropped where the context is too short
    for all of them and an answer."""
    context = sampler.config.max_len
    room = context - (settings["max_new_tokens"] or min(128, context // 2))
    tokens, dropped = sampler.encode_chat(messages), 0
    while len(tokens) > room and len(messages) > 2:
        del messages[:2]
        tokens, dropped = sampler.encode_chat(messages), dropped + 2
    if dropped:
        print(f"(the oldest {dropped} messages no longer fit into the context of {context} tokens "
              "and are forgotten)")
    return tokens
