"""`report.html`: the results of an evaluation or a sweep on one page to open from disk.

Pure: arrays and plain data in, the text of the page out. A page loads nothing from
elsewhere, and its Content-Security-Policy forbids that it could.
"""

from padim_jax.output.html.pictures import thumbnails
from padim_jax.output.html.run import run_page
from padim_jax.output.html.sweep import sweep_page

__all__ = ["run_page", "sweep_page", "thumbnails"]
