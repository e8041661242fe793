"""The documentation site, built by ``make docs``: the README, the Markdown files of this folder and the docstrings.

Sphinx reads the whole repository, not this folder alone, so every relative link of a Markdown file holds on the site as
it does in the repository: one to another Markdown file leads to its page, one to any other file to a copy of the file.
One to a folder, which has no page, becomes its text. Nothing is fetched: without intersphinx, names of other projects
are not links.
"""

import pathlib
import re

import reattn

ROOT = pathlib.Path(__file__).parents[1]

project = "reattn"
author = copyright = "the reattn authors"
version = release = reattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["*.md", "benchmarks/README.md", "docs/**.md", "examples/README.md"]
exclude_patterns = [".*", "build", "out"]
templates_path = ["_templates"]

# Indented blocks are commands; the pages of docs/api have Python in theirs.
highlight_language = "text"
# The anchors that a code host gives to headings.
myst_heading_anchors = 4

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_mock_imports = ["timm"]
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
# Else arguments that are described together would each get a line of their own, with the same text.
napoleon_use_param = False
python_maximum_signature_line_length = 88
# With -n, every name of this package that is referred to is described; others are described elsewhere.
nitpick_ignore_regex = [("py:.*", r"(collections|contextlib|os|torch)\..*|Figure|Path|Tensor")]
nitpick_ignore = [("py:class", "reattn.analysis.attentions.AttentionFunctions")]  # in a constructor that is not called

html_theme = "furo"
html_title = f"reattn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sphinx = False
# Where a reader of the built folder starts.
html_additional_pages = {"index": "start.html"}

# A README on a code host has no use for a table of contents of the site.
CONTENTS = """
```{toctree}
:hidden:
:caption: Guides
docs/install
The operator <docs/operator>
docs/training
docs/deployment
docs/analysis
docs/migration
docs/compatibility
examples/README
```

```{toctree}
:hidden:
:caption: Measurements
docs/performance
docs/benchmarks
Attention collapse, a study <docs/study>
How it is measured <benchmarks/README>
```

```{toctree}
:hidden:
:caption: Reference
docs/api/index
docs/architecture
CONTRIBUTING
CHANGELOG
```
"""
LINK = re.compile(r"\[([^\]]+)\]\(([\w./-]+)\)")


def read_source(app, docname, source):
    folder = (ROOT / docname).parent

    def unless_folder(link):
        return link[1] if (folder / link[2]).is_dir() else link[0]

    source[0] = LINK.sub(unless_folder, source[0])
    if docname == root_doc:
        source[0] += CONTENTS


def setup(app):
    app.connect("source-read", read_source)
