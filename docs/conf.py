"""Sphinx reads this: the site is made of nbs/, the package's docstrings and docs/*.md."""

import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
parser = ConfigParser(delimiters=["="])
parser.read(HERE.parent / "settings.ini")
settings = parser["DEFAULT"]

project, author = settings["title"], settings["author"]
release, copyright = settings["version"], settings["copyright"]
extensions = [
    "nbtools.site",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "nbtools", "readme", "front.md", "**.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

nb_execution_mode = "off"  # the outputs shown are those stored by `docs/tools.py run`
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = "code of the figure"
add_module_names = False
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "deflist"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-mml-chtml.js"  # copied by nbtools.site
python_use_unqualified_type_names = True
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 72

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["gfopt.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "github-dark"
# Okabe-Ito blue, as in the figures; both pass the contrast rule on their page
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0072b2",
        "color-brand-content": "#0068a3",
    },
    "dark_css_variables": {
        "color-brand-primary": "#56b4e9",
        "color-brand-content": "#6fbfee",
    },
}
