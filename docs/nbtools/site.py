"""The Sphinx extension: stages notebooks, writes the reference, copies MathJax."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from docutils import nodes

from . import api, references, stage


def prepare(app, config) -> None:
    docs = Path(app.srcdir)
    stage.stage(docs)
    api.write_pages(docs / "api")
    references.write_page(docs)


def keep_formulas(app, doctree) -> None:
    r"Pass formulas on as written: Sphinx wraps those with a line break in `split`, which allows no tag."
    for block in doctree.findall(nodes.math_block):
        if r"\\" in block.astext() and not block.get("no-wrap"):
            block["no-wrap"] = block["nowrap"] = True
            block[:] = [nodes.Text(rf"\[{block.astext()}\]")]


def copy_mathjax(app, exception) -> None:
    "One MathJax bundle and its fonts (1.6 MB) beside the pages: nothing is fetched."
    if exception or app.builder.format != "html":
        return
    package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
    source, target = package / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax"
    fonts = "output/chtml/fonts/woff-v2"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tex-mml-chtml.js", target)
    shutil.copytree(source / fonts, target / fonts, dirs_exist_ok=True)


def setup(app) -> dict:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("config-inited", prepare)
    app.connect("autodoc-process-docstring", api.parameters)
    app.connect("doctree-read", api.link_names)
    app.connect("doctree-read", references.mark_equations)
    app.connect("doctree-read", references.link_text)
    app.connect("doctree-read", keep_formulas)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
