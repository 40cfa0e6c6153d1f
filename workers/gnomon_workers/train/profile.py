"""A trace of some training steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gnomon.events import EventData, ProfileWritten
from gnomon.specs.train import UNTRACED_STEPS
from gnomon_storage.backends import mapped_errors
from gnomon_storage.location import Location
from gnomon_workers.runtime.scratch import scratch_folder


class StepProfile:
    """Records n_steps steps of an attempt, from its 11th on, and uploads them; does nothing where n_steps is 0."""

    def __init__(self, place: Location, n_steps: int, *, first_step: int, report: Callable[[EventData], None]) -> None:
        """The trace goes to `place`, and `report` is told so; the run begins at first_step."""
        self._place = place
        self._start = first_step + UNTRACED_STEPS
        self._stop = self._start + n_steps
        self._report = report
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Told of every step before it is made; tracing slows the steps that are recorded."""
        if step == self._start < self._stop:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        elif step == self._stop:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Write what was recorded of the steps before `step`; for runs that end early, too."""
        if self._profile is None:
            return
        self._profile.stop()
        with scratch_folder() as folder:
            local = folder / "trace.json.gz"
            with mapped_errors(str(local)):
                self._profile.export_chrome_trace(str(local))
            self._place.upload(local)
        self._profile = None
        self._report(ProfileWritten(url=self._place.url, first_step=self._start, n_steps=step - self._start))
