"""The reference pages, and the links between them and the notebooks."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments
from sphinx import addnodes

from .notebooks import CAPTIONS, LIB, NBS, default_exp, notebooks, read
from .raises import raises
from .stage import anchor, write_if_changed

PAGE = """# {module}

Written in {{doc}}`/notebooks/{notebook}`.

```{{eval-rst}}
.. automodule:: {module}
   :members:
   :special-members: __call__
   :member-order: bysource
   :show-inheritance:
```
"""
MARKUP = re.compile(
    r"""(:\w+(?::\w+)*:`[^`]+`|``.+?``)    # reStructuredText already
      | \$([^$]+)\$                        # $formula$
      | `([^`]+)`                          # `code`
      | (?<![\w*])(\*{1,2}[^*\s](?:[^*]*[^*\s])?\*{1,2})(?![\w*])  # *emphasis*
      | ([*|\\@]|_(?!\w)|:(?=//(?:\s|$)))  # what would be taken for markup or an address
    """,
    re.X,
)


@cache
def symbols() -> dict[str, dict[str, tuple]]:
    "Module -> its public names, as nbdev's index has them."
    return runpy.run_path(str(LIB / "_modidx.py"))["d"]["syms"]


@cache
def sources() -> dict[str, Path]:
    "Module -> the notebook it is written in, in reading order."
    found = {default_exp(read(p)): p for p in notebooks()}
    return {f"{LIB.name}.{m}": p for m, p in found.items() if m}


def write_pages(folder: Path) -> None:
    "One page for each module, an index by folder; stale pages are removed."
    pages, groups = {}, {}
    for module, path in sources().items():
        if not symbols().get(module):
            continue
        name = path.relative_to(NBS).with_suffix("").as_posix()
        groups.setdefault(name.partition("/")[0], []).append(module)
        pages[f"{module}.md"] = PAGE.format(module=module, notebook=name)
    index = ["# Reference", "Every public name, with a way back to the notebook it is written in."]
    for group, modules in groups.items():
        index += [f"## {CAPTIONS.get(group, group)}"]
        index += ["```{toctree}\n:maxdepth: 1\n\n" + "\n".join(modules) + "\n```"]
    pages["index.md"] = "\n\n".join(index) + "\n"
    for name, text in pages.items():
        write_if_changed(folder / name, text.encode())
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()


def rest(text: str) -> str:
    "Markdown mathematics and code of one line -> reStructuredText."

    def mark(match: re.Match) -> str:
        done, formula, code, emphasis, special = match.groups()
        if special:
            return f"\\{special}"
        return done or emphasis or (f":math:`{formula}`" if formula else f"``{code}``")

    return MARKUP.sub(mark, text)


def parameters(app, what, name, obj, options, lines) -> None:
    "Docments (the comments beside parameters) and errors -> a field list; a link to the notebook."
    lines[:] = [rest(line) for line in lines]
    at_top = symbols().get(name.rpartition(".")[0], {})  # not a class within a class
    if what in ("function", "class") and name in at_top:
        lines += ["", f":ref:`In the notebook <{anchor(name)}>`", ""]
    if what not in ("function", "method", "class"):
        return
    fields = documented(obj.__init__ if what == "class" else obj)
    fields += [f":raises {kind}: {rest(text)}" for kind, text in raises(obj)]
    if fields:
        lines += ["", *fields, ""]


def documented(function) -> list[str]:
    "A field for each parameter that has a comment, and for the result."
    try:
        found = docments(function, full=True, returns=True)
    except (TypeError, ValueError, AttributeError, OSError, SyntaxError):
        return []  # a built-in, or a class without an __init__ of its own
    texts = {key: rest(" ".join((entry.get("docment") or "").split())) for key, entry in found.items() if key != "self"}
    return [f":returns: {text}" if key == "return" else f":param {key}: {text}" for key, text in texts.items() if text]


@cache
def known() -> dict[str, str]:
    "What prose may call a public name -> its full name."
    found: dict[str, str] = {}
    for module, names in symbols().items():
        for full in names:
            found.setdefault(full.removeprefix(f"{module}."), full)
            found[full] = full
    return found


def link_names(app, doctree) -> None:
    "Link `name` in prose to the reference when the package exports it."
    for literal in list(doctree.findall(nodes.literal)):
        name = known().get(literal.astext().removesuffix("()"))
        taken = isinstance(literal.parent, (addnodes.pending_xref, nodes.reference, nodes.title))
        if not name or taken or "xref" in literal["classes"]:
            continue
        link = addnodes.pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=name,
            refexplicit=True,
            refwarn=False,
            refdoc=app.env.docname,
        )
        literal.replace_self(link)
        link += literal
