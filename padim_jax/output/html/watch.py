"""The page of a watched folder: what has been scored, and whether it still looks the same."""

from collections.abc import Sequence

import numpy as np

from padim_jax.core import drift
from padim_jax.output.html import charts, document
from padim_jax.output.html.document import text

SHOWN = 10_000  # images, the last ones


def watch_page(
    title: str,
    summary: str,
    against: drift.Reference | None,
    course: Sequence[tuple[float, float]],
    first: int,
    said: str,
) -> str:
    """Return `report.html` of a watched folder.

    Args:
      title: of the page, plain text.
      summary: number of images, plain text.
      against: what images are compared with; None if there is nothing.
      course: mean p-value and number of images from the cut on (see `drift.Course`), after each
        of the last images; NaN where unknown.
      first: number of the first of these among all scored images, from 1.
      said: drift at present, plain text; "" for none.

    Returns:
      HTML, all of which can be encoded.
    """
    if against is None:
        body = (
            "<p>No test of drift: the model has no thresholds from normal images, or they are "
            "of groups of images, or of too few.</p>"
        )
    elif not course:
        body = "<p>No image is scored yet.</p>"
    else:
        means, high = np.array(course, np.float64).T
        numbers = np.arange(first, first + len(means), dtype=np.float64)
        low, top = 0.5 - against.band, 0.5 + against.band
        most = against.most / drift.WINDOW
        pictures = [
            charts.course(numbers, means, (low, top), "mean p-value"),
            charts.course(
                numbers,
                high / drift.WINDOW,
                (0.0, most),
                "share scoring high",
            ),
        ]
        state = "what" if said else "faint"
        body = (
            f'<p class="{state}">{text(said or "No drift at present.")}</p>'
            f"{''.join(pictures)}"
            f'<p class="faint">After each of the last {len(means):,} scored images: the mean '
            f"p-value of the last {drift.WINDOW} called normal (1/2 as in the calibration, "
            f"less for higher scores), and how many of the last {drift.WINDOW} score as high "
            "as anomalous ones. The dashed lines are the bounds; at most "
            f"{drift.RATE:.0%} of runs of {drift.IMAGES:,} images like those of the "
            "calibration leave them at any time.</p>"
        )
    return document.page(
        f"{title}: watched folder",
        f'{document.header(title, summary)}<main id="main"><section aria-labelledby="drift">'
        f'<h2 id="drift">Drift</h2>{body}</section></main>',
    )
