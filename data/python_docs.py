"""Data sets that every Python installation carries: its documentation and its source code.

Sources are parsed, not imported: no side effects, and the same documents on every machine with this
version of Python.
"""
import ast
import gc
import itertools
import sysconfig
import warnings
from pathlib import Path

from data.files import VAL_FRACTION, shuffled, split_by_hash

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
               "lib2to3"}
LONG_PARAGRAPH = 80     # characters; "Changed in version 3.8:" is shorter and may stand twice


def pydocs():
    """Python's language reference and the docstrings of its library: 2 MB, embedded"""
    documents = list(language_reference())
    for signature, text in docstrings():
        documents.append(f"{signature}\n{text}")
    return split_by_hash(shuffled(documents), VAL_FRACTION)


def pystdlib():
    """the source code of Python's library: 11 MB, embedded"""
    sources = [source for _, source in library_sources()]
    return split_by_hash(shuffled(sources), VAL_FRACTION)


# --------------------------------------------------------------------------------------------------
# The library


def library_sources():
    """(module name, source) of each module of the standard library but its tests, in the order of
    their paths. FileNotFoundError where this Python has none."""
    library = Path(sysconfig.get_path("stdlib"))
    names = {path: path.relative_to(library) for path in library.rglob("*.py")}
    paths = sorted(path for path, name in names.items() if not NOT_LIBRARY & set(name.parts))
    if not paths:
        raise FileNotFoundError(f"this Python has no library sources in {library}: give a text "
                                "file or folder instead")
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:           # a few files are in Latin-1 on purpose
            continue
        module = ".".join(names[path].with_suffix("").parts)
        yield module.removesuffix(".__init__"), source


def docstrings():
    """(signature, docstring) of the library's modules, classes and functions, each docstring
    once."""
    seen = set()
    for module, source in library_sources():
        for node in definitions(parse(source)):
            text = (ast.get_docstring(node) or "").strip()
            if text and text not in seen:
                seen.add(text)
                yield signature(node, module), text


def parse(source):
    """The syntax tree of a module. Garbage collection would look through it again and again and
    find nothing: without it this takes half the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # invalid escapes in old modules
            return ast.parse(source)
    finally:
        if collecting:
            gc.enable()


def definitions(node):
    """The module, class and function nodes of a syntax tree, in source order. Expressions have
    none, so are skipped."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from definitions(child)


def signature(node, module):
    """The line of source above a docstring: `def get(self, key, default=None):`, `class Queue:`, or
    `module queue`."""
    if isinstance(node, ast.Module):
        return f"module {module}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


# --------------------------------------------------------------------------------------------------
# The language reference


def language_reference():
    """The sections of pydoc's topics. Topics quote each other at length, so a paragraph is kept
    only where it comes first: with copies in both splits, the validation loss would measure
    memory."""
    from pydoc_data.topics import topics

    seen = set()
    for _, topic in sorted(topics.items()):
        for section in sections(topic):
            new = [text for text in section.split("\n\n") if text not in seen]
            long = [text for text in new if len(text) > LONG_PARAGRAPH]
            seen.update(long)
            if long:
                yield "\n\n".join(new)


def sections(text):
    """Cut reStructuredText above each heading."""
    lines = text.strip().split("\n")
    cuts = [0]
    for i, (line, below) in enumerate(itertools.pairwise(lines)):
        if is_heading(line, below):
            cuts.append(i)
    cuts.append(len(lines))
    for begin, end in itertools.pairwise(cuts):
        section = "\n".join(lines[begin:end]).strip()
        if section:
            yield section


def is_heading(line, below):
    """Whether a line is underlined by a row of one punctuation character."""
    is_row = len(set(below)) == 1 and below[0] in "*=-~^\""
    return is_row and len(below) >= len(line) > 2 and line.strip() != ""
