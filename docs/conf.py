"""Configuration of the documentation, which `bash launch/docs.sh` builds.

The source folder is the repository, so that README.md, SECURITY.md and the pages of docs/ link
to each other by the same relative paths on the site and in the repository.
"""

import dataclasses
import importlib.metadata
import inspect
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

from padim_jax.config import schema
from padim_jax.config.settings import Config

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


def setup(app: Sphinx) -> None:
    """Register what Sphinx calls while it builds."""
    app.connect("source-read", fill_in_settings)


def fill_in_settings(app: Sphinx, page: str, source: list[str]) -> None:
    """Put all settings where the page of settings names their dataclass."""
    if page == "docs/reference/settings":
        source[0] = source[0].replace("<!-- Config -->", explain(Config))


def explain(group: Any) -> str:
    """Return a dataclass of settings, and the groups in it, as Markdown."""
    texts = ModuleAnalyzer.for_module(group.__module__).find_attr_docs()
    defaults = schema.defaults(group).to_dict()

    def sections(group: Any, defaults: Any, name: str) -> Iterator[str]:
        fields = dataclasses.fields(group)
        for field in (field for field in fields if not schema.is_group(field)):
            check = schema.statement(field).check
            yield f"#### {name}.{field.name}"
            yield f"Default: `{defaults[field.name]!r}`."
            if dataclasses.is_dataclass(check):  # it has a text
                yield f"Allowed: {check}."
            yield "\n".join(texts[group.__name__, field.name])
        for field in filter(schema.is_group, fields):
            yield f"### {name}.{field.name}"
            yield str(inspect.getdoc(field.type))
            yield from sections(field.type, defaults[field.name], f"{name}.{field.name}")

    return "\n\n".join(sections(group, defaults, "config"))
