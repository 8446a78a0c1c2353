"""Drift of a run of images: the test's state, its messages, the page of a watched folder."""

import collections
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from padim_jax.core import drift
from padim_jax.core.calibration import Calibration
from padim_jax.data.files import shown
from padim_jax.output.html.watch import SHOWN, watch_page
from padim_jax.system import paths
from padim_jax.system.journal import Row
from padim_jax.system.paths import Path

REPORT = "report.html"
_AT_ONCE = 4096  # scores of a journal
_REPORT_SECONDS = 600.0  # between two writings of the report, unless something changes


def summary(calibration: Calibration | None, rows: Iterable[Row]) -> str:
    """Return the first drift of predictions in one line; "" if there is none.

    Args:
      calibration: calibration of the detector.
      rows: those of the predictions' journal, in order.
    """
    if (against := drift.reference(calibration)) is None:
        return ""
    state, rest, before = drift.State(), iter(rows), 0
    while part := list(itertools.islice(rest, _AT_ONCE)):
        scores = np.array([float(row.fields["score"]) for row in part])
        state, course = drift.follow(against, state, scores)
        if course.drifted.any():
            i = int(np.argmax(course.drifted))
            said = drift.text(against, course.means[i], course.high[i])
            return f"{said} (at {shown(part[i].fields['path'])}, image {before + i + 1})"
        before += len(part)
    return ""


class Monitor:
    """Follows the scores of images; a function of these and of nothing else.

    Args:
      calibration: calibration of the detector; None for none, which tests nothing.
      scores: those of the images before, as they are in the journal.

    Attributes:
      drift: what is wrong, in one line for a person; "" for nothing. Once there is a drift, it
        ends with as many images without one as there are in a window.
      count: number of images.
    """

    def __init__(self, calibration: Calibration | None, scores: Iterable[float] = ()):
        self._against = drift.reference(calibration)
        self._state, self.drift, self.count = drift.State(), "", 0
        self._course: collections.deque[tuple[float, float]] = collections.deque(maxlen=SHOWN)
        self._calm = 0  # images since the last one with a drift
        rest, self._written, self._shown = iter(scores), -math.inf, (-1, "")
        while part := list(itertools.islice(rest, _AT_ONCE)):
            self.add(part)

    def add(self, scores: Sequence[float]) -> list[dict[str, Any]]:
        """Return the fields of the next images' lines; "" for what is unknown.

        Args:
          scores: their scores.

        Returns:
          For each `mean_p`, the mean p-value after it, and `drift`, 0 or 1.
        """
        self.count += len(scores)
        if self._against is None or not scores:
            return [{"mean_p": "", "drift": ""} for _ in scores]
        self._state, course = drift.follow(self._against, self._state, np.array(scores))
        pairs = list(zip(course.means.tolist(), course.high.tolist(), strict=True))
        self._course.extend(pairs)
        for pair, said in zip(pairs, course.drifted.tolist(), strict=True):
            self._calm = 0 if said else self._calm + 1
            if said:
                self.drift = drift.text(self._against, *pair)
            elif self._calm >= drift.WINDOW:
                self.drift = ""
        return [
            {
                "mean_p": "" if math.isnan(mean) else round(mean, 6),
                "drift": int(said) if not math.isnan(high) else "",
            }
            for (mean, high), said in zip(pairs, course.drifted.tolist(), strict=True)
        ]

    def write_report(self, folder: Path, title: str, summary: str, now: bool = False) -> None:
        """Write report.html, if it is due and something has changed.

        Args:
          folder: where it goes.
          title: plain text.
          summary: number of images, plain text.
          now: whether it is due whatever the time is; it is as well where a drift has begun or
            ended.

        Raises:
          UserError: it cannot be written.
        """
        changed = bool(self.drift) != bool(self._shown[1])
        due = now or changed or time.monotonic() - self._written >= _REPORT_SECONDS
        if not due or self._shown == (self.count, self.drift):
            return
        first = self.count - len(self._course) + 1
        page = watch_page(title, summary, self._against, self._course, first, self.drift)
        with paths.explained():
            paths.write(folder / REPORT, page.encode())
        self._written, self._shown = time.monotonic(), (self.count, self.drift)
