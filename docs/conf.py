"""Sphinx settings of the documentation site: `make docs` builds it into site/.

The sources are the Markdown files of the whole repository, so that links between them work on the site as they do in a
checkout. The API reference comes from the docstrings.
"""

import html
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import tiny_lm

ROOT = Path(__file__).parent.parent

project = "tiny-lm"
version = release = tiny_lm.__version__
root_doc = "docs/index"
include_patterns = ["docs/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "dev/LOG.md"]
CONTENTS = {
    "Start": ["README", "docs/tutorial"],
    "Guides": [
        "docs/training",
        "docs/inference",
        "docs/evaluation",
        "docs/serving",
        "docs/deployment",
        "docs/onnx",
        "docs/scaling",
    ],
    "Reference": [
        "docs/cli",
        "docs/api",
        "docs/formats",
        "docs/troubleshooting",
        "docs/glossary",
        "docs/benchmarks",
        "CHANGELOG",
    ],
    "Development": ["docs/architecture", "CONTRIBUTING", "dev/LOG"],
}
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
suppress_warnings = ["myst.header"]  # a changelog repeats its headings below each version

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
default_role = "code"

html_theme = "furo"
html_title = "tiny-lm"
html_show_sphinx = False
html_copy_source = False

# Diagrams are drawn in the browser by mermaid, which `make docs` copies into the site where npm can install it. A site
# without it shows their sources, which are meant to be read, too. Nothing is loaded from another host.
MERMAID = ROOT / "build" / "mermaid" / "node_modules" / "mermaid" / "dist"
if (MERMAID / "mermaid.min.js").exists():
    html_static_path = [str(MERMAID / "mermaid.min.js")]
    html_js_files = ["mermaid.min.js"]


class Mermaid(SphinxDirective):
    """A fenced block of the language mermaid."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the source in the element that mermaid looks for."""
        source = html.escape("\n".join(self.content))
        return [nodes.raw("", f'<pre class="mermaid">{source}</pre>', format="html")]


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Append the table of contents to the first page; as a directive in the file, GitHub would show it as code."""
    if page == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(
                ["", "```{toctree}", ":hidden:", f":caption: {caption}", *[f"/{page}" for page in pages], "```", ""]
            )


def setup(app: Sphinx) -> None:
    """Register what this file adds."""
    app.add_directive("mermaid", Mermaid)
    app.connect("source-read", add_contents)
