"""Where a project's things lie: the one place that joins their names.

<project's root>/
  activations/<store id>/                        an activation store
  checkpoints/<job id>/[<variant>/]              checkpoints of all attempts at a train job
  dictionaries/<dictionary id>/attempt-0002/     what one attempt published
  profiles/<job id>/attempt-0002.json.gz         the trace of one attempt
"""

from __future__ import annotations

from dataclasses import dataclass

from gnomon_storage.location import Location


@dataclass(frozen=True, slots=True)
class ProjectLayout:
    """The places of one project, below its root; nothing of them need exist."""

    root: Location

    @classmethod
    def open(cls, url: str) -> ProjectLayout:
        """The places below a project's root."""
        return cls(Location.open(url))

    @classmethod
    def of(cls, projects: str, project: str) -> ProjectLayout:
        """The places of a project, below the folder of all projects."""
        return cls(Location.open(projects).child(project))

    def store(self, store_id: str) -> Location:
        """Folder of an activation store."""
        return self.root.child("activations", store_id)

    def checkpoints(self, job_id: str, variant: str = "") -> Location:
        """Folder of the checkpoints of all attempts at a train job; of each variant by themselves."""
        folder = self.all_checkpoints.child(job_id)
        return folder.child(variant) if variant else folder

    @property
    def all_checkpoints(self) -> Location:
        """Folder of the checkpoints of all train jobs, one folder for each."""
        return self.root.child("checkpoints")

    def dictionary(self, dictionary_id: str) -> Location:
        """Folder of a dictionary, with one folder for each attempt that got so far."""
        return self.root.child("dictionaries", dictionary_id)

    def profile(self, job_id: str, attempt: int) -> Location:
        """The trace of an attempt, where its job asks for one."""
        return self.root.child("profiles", job_id, f"{attempt_name(attempt)}.json.gz")


def attempt_name(attempt: int) -> str:
    """Name of what one attempt wrote, where attempts lie side by side."""
    return f"attempt-{attempt:04d}"
