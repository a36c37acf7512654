"""The site: ``sphinx-build -W docs docs/_build``. Building and reading it need no network."""

import nbnorm

project = "nbnorm"
project_copyright = "the nbnorm contributors"
release = nbnorm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # in docstrings `batch_norm` is a link where the name is known, and code where it is not

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings give types in the words of the field: shapes and dtypes
napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes as a list, like parameters
napoleon_use_rtype = False  # one list entry for name, type and text of what is returned
myst_heading_anchors = 3
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"nbnorm {release}"
