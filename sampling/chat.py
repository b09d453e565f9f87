"""A conversation in the terminal, in the checkpoint's own chat format."""
import sys

from common import seed_for
from sampling.sampler import Trace
from sampling.terminal import Terminal, printable


def converse(sampler, settings):
    """Read questions until the end of the input and answer them; settings: the constants of sample.py by name."""
    messages, typed = [], sys.stdin.isatty()
    sampler.tokenizer.note_missing_template()
    if typed:
        import readline  # noqa: F401  arrow keys and history for input()
        print("Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D leaves.")
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
            messages.append({"role": "user", "content": line})
            try:
                answer(sampler, settings, messages)
            except KeyboardInterrupt:
                messages.pop()
                print("\n(stopped; the question is forgotten)")
            except ValueError as error:
                messages.pop()
                print(f"error: {error}")


def answer(sampler, settings, messages):
    """Print the answer and append it. The oldest turns are dropped where the context is too short for all."""
    asked, context = settings["max_new_tokens"], sampler.config.max_len
    tokens, dropped = sampler.encode_chat(messages), 0
    while len(tokens) > context - (asked or min(128, context // 2)) and len(messages) > 2:
        del messages[:2]
        tokens, dropped = sampler.encode_chat(messages), dropped + 2
    if dropped:
        print(f"(the oldest {dropped} messages no longer fit into the context of {context} tokens and are forgotten)")
    count = sampler.fit(tokens, asked)
    turn = {**settings, "seed": seed_for("turn of a chat", settings["seed"], len(messages)),
            "block_length": min(settings["block_length"], count)}
    arguments = sampler.arguments(count, turn, chat=True)
    terminal = Terminal(begin=len(tokens), pause=settings["pause"])
    trace = Trace(sampler, arguments["remasking"], terminal.draw if settings["show"] or terminal.in_place else None)
    try:
        completion = sampler.run([tokens], arguments, on_step=trace)[0][len(tokens):]
    finally:
        terminal.clear()
    text, *_ = sampler.decode(completion, chat=True)
    print(printable(text.strip()))
    print(f"({trace.report(len(completion))})")
    messages.append({"role": "assistant", "content": text.strip()})
