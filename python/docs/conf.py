"""Sphinx's configuration: the pages of this folder, and the READMEs and results they link to.

The source folder is the checkout, so that a link leads to the same file on the site as in the
repository:

    sphinx-build --fail-on-warning -c python/docs . build/docs
"""

from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.util.docutils import SphinxDirective

import asymq

project = "asymq"
author = "the authors of asymq"
version = release = asymq.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]

root_doc = "python/docs/index"
include_patterns = ["python/**.md", "python/docs/**.rst", "csrc/*.md", "cuda/*.md", "scripts/**.md"]
include_patterns += ["tests/*.md", "CHANGELOG.md", ".github/CONTRIBUTING.md"]
exclude_patterns = [".git", ".venv", "build"]
suppress_warnings = ["myst.header"]  # records of results may have no title

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "asymq"
html_extra_path = ["root"]  # an index.html that leads to root_doc's


class Markdown(SphinxDirective):
    """What its lines say in Markdown: the docstrings of asymq."""

    has_content = True

    def run(self):
        document = new_document("docstring", self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def as_markdown(app, what, name, obj, options, lines):
    lines[:] = [".. markdown::", "", *(f"   {line}" for line in lines), ""]


def mark_linked(app, env):
    """What lies elsewhere is linked, not listed."""
    for name in env.found_docs:
        if not name.startswith("python/docs/"):
            env.metadata[name]["orphan"] = ""


def setup(app):
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", as_markdown)
    app.connect("env-updated", mark_linked)
