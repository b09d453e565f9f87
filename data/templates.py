"""Chat templates: programs in jinja2 that a stranger wrote. They run in a sandbox and for a limited
time, with the helpers that such templates expect, so that they write what they do in
`transformers`.
"""
import contextlib
import functools
import json
import sys
import time

LARGEST_PRODUCT = 10**7     # of the operands' sizes: it could fill the memory in one call


def render_template(text, variables, seconds=5.0):
    """Render a chat template, for `seconds` at most. Whatever goes wrong in it is one
    ValueError."""
    try:
        with deadline(seconds):
            return compile_template(text).render(**variables)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  the template is a program: it can raise anything
        raise ValueError(f"the chat template failed: {one_line(error)}") from None


def one_line(error):
    """An error's message, or any text, on one line of 300 characters at most."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@functools.lru_cache(maxsize=8)
def compile_template(text):
    """Compiling a template takes far longer than rendering it."""
    return sandbox().from_string(text)


@functools.cache
def sandbox():
    """jinja2's immutable sandbox (no private attributes, no changes to its input), set up as
    `transformers` does."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context, operator, left, right):
            # These two can fill the memory in one call, where no deadline reaches.
            if operator == "**" or size(left) * size(right) > LARGEST_PRODUCT:
                raise SecurityError(f"{operator} with operands this large is not allowed")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant said; the text is all
        that matters here."""
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True,
                          extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = time.strftime
    return environment


def size(operand):
    """The length of a text or a list, or how large a number is."""
    return len(operand) if hasattr(operand, "__len__") else abs(operand)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter `tojson`. jinja2's own escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


@contextlib.contextmanager
def deadline(seconds):
    """Raise TimeoutError in Python code that takes longer of the processor: a trace function sees
    every line, in any thread. Other work on the machine does not count."""
    end = time.thread_time() + seconds

    def trace(frame, event, argument):
        if time.thread_time() > end:
            raise TimeoutError(f"it ran longer than {seconds:g} seconds")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
