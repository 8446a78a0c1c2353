"""Configuration of the documentation, which `bash launch/docs.sh` builds.

The source folder is the repository, so that README.md, SECURITY.md and the pages of docs/ link
to each other by the same relative paths on the site and in the repository.
"""

import importlib.metadata

project = "padim_jax"
copyright = "The padim_jax authors"
release = version = importlib.metadata.version("padim-jax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "launch/README.md", "third_party/*.md"]
exclude_patterns = ["**/.*"]

html_theme = "furo"
html_title = f"padim_jax {release}"
html_extra_path = ["redirect"]  # the site's first page lies in docs/

# Docstrings mark code by single backticks; what names an object becomes a link.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
python_maximum_signature_line_length = 88

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub names them
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
