"""How Sphinx builds the site: `sphinx-build -W docs build/site`, then open build/site/index.html."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the two extensions beside this file, and the package as it is here

# The tutorial trains on one thread a process, so that its numbers are the same wherever the bits are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "stillroom"
author = "The stillroom authors"
copyright = "The stillroom authors, MIT licence"
# The comparison's own table is a page that has no title, and is linked to where the results speak of it.
suppress_warnings = ["toc.no_title"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "executed", "plain_docstrings"]
exclude_patterns = ["_executed"]  # what pages that run have written
html_theme = "furo"
html_title = "stillroom"
html_copy_source = False

myst_heading_anchors = 3
myst_links_external_new_tab = False
# Blocks that name no language are words, not code.
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100

# Links out of the site are checked by `sphinx-build -b linkcheck docs build/links`, which wants a network; those within
# it by every build.
linkcheck_timeout = 20
linkcheck_retries = 2
