"""The SDK for asyncio: the calls of `gnomon.client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack, cast, overload

import httpx2

from gnomon import _requests
from gnomon._download import FileDownload, plan_download
from gnomon._http import AsyncSession
from gnomon._requests import SubmitOptions, Submittable
from gnomon._results import JobResult, result_of
from gnomon._settings import resolve_settings
from gnomon._sse import GLANCE_S, Deadline, EventCursor
from gnomon.errors import Unavailable
from gnomon.plans import JobPlan
from gnomon.progress import Display, make_display
from gnomon.resources import (
    TERMINAL_STATES,
    ActivationStoreRecord,
    ApiKey,
    ClusterState,
    Collection,
    DictionaryRecord,
    EvaluateResult,
    Event,
    HarvestResult,
    Job,
    JobKind,
    JobState,
    NewApiKey,
    ProjectState,
    TrainResult,
)
from gnomon.specs import EvaluateSpec, HarvestSpec, JobRequest, TrainSpec
from gnomon.specs.request import JobClass

R_co = TypeVar("R_co", bound=JobResult, covariant=True)


class AsyncClient:
    """A connection to a Gnomon service, for asyncio; see `Client` for all arguments."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_s: float = 30.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._session = AsyncSession(resolve_settings(url, key, timeout_s=timeout_s), transport)

    @property
    def url(self) -> str:
        """The service's URL."""
        return self._session.settings.url

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @overload
    async def submit(self, spec: HarvestSpec, **options: Unpack[SubmitOptions]) -> AsyncJobHandle[HarvestResult]: ...
    @overload
    async def submit(self, spec: TrainSpec, **options: Unpack[SubmitOptions]) -> AsyncJobHandle[TrainResult]: ...
    @overload
    async def submit(self, spec: EvaluateSpec, **options: Unpack[SubmitOptions]) -> AsyncJobHandle[EvaluateResult]: ...
    @overload
    async def submit(
        self, spec: JobRequest | Mapping[str, Any], **options: Unpack[SubmitOptions]
    ) -> AsyncJobHandle[JobResult]: ...

    async def submit(self, spec: Submittable, **options: Unpack[SubmitOptions]) -> AsyncJobHandle[Any]:
        """Queue a job; see `Client.submit`."""
        return AsyncJobHandle(self, await self._session.send(_requests.submit(spec, options)))

    async def plan(self, spec: Submittable) -> JobPlan:
        """What a job would take, without queuing it; see `Client.plan`."""
        return await self._session.send(_requests.plan(spec))

    async def jobs(
        self, *, state: JobState | None = None, kind: JobKind | None = None, limit: int | None = 100
    ) -> list[Job]:
        """Jobs, newest first; limit=None for all."""
        return await self._session.run(_requests.jobs(state=state, kind=kind, limit=limit))

    async def job(self, job_id: str) -> AsyncJobHandle[JobResult]:
        """A job by id."""
        return AsyncJobHandle(self, await self._session.send(_requests.job(job_id)))

    async def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; a job that has ended stays as it is."""
        return await self._session.send(_requests.cancel(job_id))

    async def resume(self, job_id: str) -> Job:
        """Queue a job again that failed or was cancelled: it goes on from its last checkpoint or segment.

        A job that has not ended stays as it is; raises Conflict where it succeeded.
        """
        return await self._session.send(_requests.resume(job_id))

    async def pause(self, job_id: str) -> Job:
        """Let a job wait until it is resumed; one that runs saves what it has. Raises Conflict if it has ended."""
        return await self._session.send(_requests.pause(job_id))

    async def change(self, job_id: str, *, job_class: JobClass | None = None, priority: int | None = None) -> Job:
        """Give a job that has not ended another class or priority; raises Conflict where it has."""
        return await self._session.send(_requests.change(job_id, job_class, priority))

    async def clone(
        self, job_id: str, changes: Mapping[str, Any], **options: Unpack[SubmitOptions]
    ) -> AsyncJobHandle[JobResult]:
        """Queue another job with the spec of one that there is, but for some fields: {"activation": {"k": 64}}, say.

        A mapping changes the fields that it names; any other value replaces what was there. Options as of `submit`;
        the name is the job's, unless another is given.
        """
        job = await self._session.send(_requests.job(job_id))
        return AsyncJobHandle(
            self, await self._session.send(_requests.submit(_requests.changed(job, changes), options))
        )

    async def events(self, job_id: str, *, after: int = 0, follow: bool = False) -> AsyncIterator[Event]:
        """Events of a job with id > after; with follow=True, also those to come until it ends."""
        if follow:
            async for event in self._follow(EventCursor(job_id=job_id, after=after)):
                yield event
        else:
            for event in await self._session.run(_requests.events(job_id, after)):
                yield event

    async def activations(self, *, limit: int | None = 100) -> list[ActivationStoreRecord]:
        """Activation stores, newest first; limit=None for all."""
        return await self._session.run(_requests.activations(limit))

    async def activation_store(self, store_id: str) -> ActivationStoreRecord:
        """An activation store by id."""
        return await self._session.send(_requests.activation_store(store_id))

    async def dictionaries(self, *, limit: int | None = 100) -> list[DictionaryRecord]:
        """Published dictionaries, newest first; limit=None for all."""
        return await self._session.run(_requests.dictionaries(limit))

    async def dictionary(self, dictionary_id: str) -> AsyncRemoteDictionary:
        """A published dictionary by id."""
        return AsyncRemoteDictionary(self, await self._session.send(_requests.dictionary(dictionary_id)))

    async def keys(self) -> list[ApiKey]:
        """API keys of this project, without their secrets."""
        return await self._session.run(_requests.keys(None))

    async def create_key(
        self, name: str, *, scopes: tuple[str, ...] = ("read", "write"), expires_in_s: int | None = None
    ) -> NewApiKey:
        """Make an API key; the answer is the only place where its text is ever shown."""
        return await self._session.send(_requests.create_key(name, scopes, expires_in_s))

    async def revoke_key(self, key_id: str) -> None:
        """Revoke an API key."""
        await self._session.send(_requests.revoke_key(key_id))

    async def delete_activations(self, store_id: str) -> None:
        """Delete an activation store that no job uses; the same harvest then makes it anew.

        Its bytes go soon, by a dispatcher; until then it is "deleting", and cannot be harvested.
        """
        await self._session.send(_requests.delete_activations(store_id))

    async def delete_dictionary(self, dictionary_id: str) -> DictionaryRecord:
        """Delete a dictionary's files after some days, by the service's settings; it can be restored until then."""
        return await self._session.send(_requests.delete_dictionary(dictionary_id))

    async def restore_dictionary(self, dictionary_id: str) -> DictionaryRecord:
        """Undo a deletion whose files are still there."""
        return await self._session.send(_requests.restore_dictionary(dictionary_id))

    async def collection(self) -> Collection:
        """What of this project's bytes is deleted, when and why, and what was deleted last."""
        return await self._session.send(_requests.collection())

    async def cluster(self) -> ClusterState:
        """What the service can run on."""
        return await self._session.send(_requests.cluster())

    async def drain(self, node_id: str | None = None, *, is_drained: bool = True) -> ClusterState:
        """Start nothing on the cluster and finish what runs, or have all leave one node; is_drained=False ends that."""
        return await self._session.send(_requests.drain(node_id, is_drained=is_drained))

    async def project(self) -> ProjectState:
        """What this key's project is owed of the cluster, and may take."""
        return await self._session.send(_requests.project())

    async def hold(self, *, is_held: bool = True) -> ProjectState:
        """Start nothing of this project; what runs goes on. is_held=False ends that."""
        return await self._session.send(_requests.hold(is_held=is_held))

    async def _follow(self, cursor: EventCursor) -> AsyncIterator[Event]:
        cursor.begin()
        while not cursor.is_over():
            error: Unavailable | None = None
            try:
                async with self._session.stream(cursor.connect(), cursor.read_timeout_s) as response:
                    async for line in response.aiter_lines():
                        event = cursor.feed(line)
                        if event is not None:
                            yield event
                        if cursor.is_glance_over():
                            return
            except Unavailable as lost:
                error = lost
            if error is None and cursor.is_idle and (await self.job(cursor.job_id)).state in TERMINAL_STATES:
                return
            await asyncio.sleep(cursor.disconnected(error))

    async def _download(self, dictionary: DictionaryRecord, folder: Path) -> Path:
        for download in plan_download(dictionary, folder):
            with download:
                await asyncio.to_thread(download.start)
                while not download.is_done:
                    try:
                        await self._receive(download)
                    except Unavailable as lost:
                        await asyncio.sleep(download.broken(lost, self._session.settings.n_attempts))
                await asyncio.to_thread(download.finish)
        return folder

    async def _receive(self, download: FileDownload) -> None:
        async with self._session.stream(download.request(), self._session.settings.timeout_s) as response:
            download.begin(response)
            async for piece in response.aiter_bytes():
                download.write(piece)
        download.end()


class AsyncJobHandle(Generic[R_co]):
    """A job on the service; `job` is what was last seen of it."""

    def __init__(self, client: AsyncClient, job: Job) -> None:
        self._client = client
        self.job = job

    @property
    def id(self) -> str:
        """The job's id."""
        return self.job.id

    @property
    def state(self) -> JobState | str:
        """The state last seen; `refresh` asks again."""
        return self.job.state

    @property
    def result(self) -> R_co:
        """The result last seen; raises JobFailed if the job ended otherwise, Conflict if it has not ended."""
        return cast(R_co, result_of(self.job))

    async def refresh(self) -> Job:
        """Ask the service how the job is."""
        self.job = (await self._client.job(self.id)).job
        return self.job

    async def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> R_co:
        """Wait until the job has ended and return its result; see `JobHandle.wait`."""
        deadline = Deadline.after(timeout_s)
        await self.refresh()
        with make_display(progress) as display:
            for job_id in self.job.depends_on if self.state not in TERMINAL_STATES else ():
                await self._watch((await self._client.job(job_id)).job, display, deadline)
            self.job = await self._watch(self.job, display, deadline)
        return self.result

    async def _watch(self, job: Job, display: Display, deadline: Deadline) -> Job:
        """Show a job until it ends; a dependency only as long as this job waits for it."""
        is_dependency = job.id != self.id
        cursor = EventCursor(job_id=job.id, deadline=deadline, glance_s=GLANCE_S if is_dependency else None)
        display.begin(job)
        while job.state not in TERMINAL_STATES:
            if is_dependency and (await self.refresh()).state in TERMINAL_STATES:
                break
            async for event in self._client._follow(cursor):
                display.show(job, event)
            job = (await self._client.job(job.id)).job
        display.end(job)
        return job

    async def cancel(self) -> Job:
        """Ask the job to stop."""
        self.job = await self._client.cancel(self.id)
        return self.job

    async def resume(self) -> Job:
        """Queue the job again, which failed or was cancelled."""
        self.job = await self._client.resume(self.id)
        return self.job

    async def pause(self) -> Job:
        """Let the job wait until it is resumed; if it runs, it saves what it has first."""
        self.job = await self._client.pause(self.id)
        return self.job

    def events(self, *, after: int = 0, follow: bool = False) -> AsyncIterator[Event]:
        """Events of the job with id > after; with follow=True, also those to come until it ends."""
        return self._client.events(self.id, after=after, follow=follow)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.job.kind} {self.state}>"


class AsyncRemoteDictionary:
    """A published dictionary on the service; `info` is its description."""

    def __init__(self, client: AsyncClient, info: DictionaryRecord) -> None:
        self._client = client
        self.info = info

    @property
    def id(self) -> str:
        """The dictionary's id."""
        return self.info.id

    async def download(self, path: str | Path | None = None) -> Path:
        """Fetch all files into a folder (default: one named by the id, here); see `RemoteDictionary.download`."""
        return await self._client._download(self.info, Path(path if path is not None else self.id))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.info.hook_name} d_sae={self.info.d_sae}>"
