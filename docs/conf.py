"""How the pages are built: ``python -m sphinx -W -n docs OUT``; a test does it, warnings are errors."""

from wnodes_core import __version__

project = "wnodes"
release = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"description": "Any batch job in its own virtual machine", "page_width": "1100px"}
exclude_patterns = ["toy"]
highlight_language = "text"
