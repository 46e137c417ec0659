"""The other use case: speech comes in while it is spoken, and what is heard goes out.

A session is one request. What must be refused is refused before it begins, audio is paid for before a
recognizer gets it, and whatever ends a session, what was said until then is told and charged.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from voxgate.audio import UnusableAudio
from voxgate.audio.decode import BYTES_PER_SECOND
from voxgate.audio.live import Decoder, decoder
from voxgate.catalog import Deployment, started_tenths
from voxgate.dialects import live as dialect
from voxgate.dialects import naming
from voxgate.errors import (
    ClientGone,
    InsufficientQuota,
    InvalidInput,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    RequestTimeout,
    VoxgateError,
)
from voxgate.fallback import Fallback
from voxgate.metering import Gate, Reply, Tab
from voxgate.model import Heard
from voxgate.multipart import Field
from voxgate.providers import LiveEngine
from voxgate.routing import Asked
from voxgate.transcribe import Transcriber

logger = logging.getLogger(__name__)

_SECOND = BYTES_PER_SECOND  # of what recognizers take
_SLICE = 50  # tenths of a second that are set aside at a time
_IDLE_SECONDS = 30.0
_BURST_SECONDS, _MOST_SPEED = 30.0, 16  # how far, and then how many times as fast as speech, audio may come
_RENEW_SECONDS = 30.0  # in which a session without audio says that it still has its place
_FLUSH_SECONDS = 60.0  # for what is left at the end
_KEPT = 40 * _SECOND  # longer than any utterance: a recognizer that is lost is told again what is not final
_PIECE = _SECOND // 10
MOST_MESSAGE = 512 * 1024  # bytes that a client sends at once
NORMAL, INTERNAL_ERROR, RESTART = 1000, 1011, 1012


@dataclass(eq=False)
class Socket:
    """What a host has to give: the client's messages, one after the other, and a way to answer. Both raise
    `ClientGone`."""

    receive: Callable[[], Awaitable[bytes | str]]
    send: Callable[[Any], Awaitable[None]]
    _sequence: int = 0

    async def tell(self, message: dict[str, Any]) -> None:
        """Raises `ClientGone`."""
        kind = message.pop("type")
        body = {"type": kind, "sequence": self._sequence} | message
        self._sequence += 1
        await self.send(body)


@dataclass(kw_only=True, eq=False)
class Live:
    transcriber: Transcriber
    gate: Gate
    max_seconds: float

    @contextlib.asynccontextmanager
    async def session(
        self, request_id: str, headers: Mapping[str, str], query: Mapping[str, str], told: MutableMapping[str, str]
    ) -> AsyncIterator[Session]:
        """Raises what the client is to see instead. `told` takes the headers that it is to see with it."""
        async with self.gate.request(request_id, dialect.NAME, headers, "", told, tokens=True) as tab:
            form, extra = dialect.LiveForm.read(tuple(Field(name, value) for name, value in query.items()))
            request = form.request()
            with naming(model="model_id"):
                models = self.transcriber.models(request, tab.caller)
                tab.note(model=models[0].id)
                deployments = await self.transcriber.choose(models, Asked(request, 0.0, 0))
            purse = _Purse(tab, deployments)
            await purse.cover(1)
            line = _Line(self.transcriber.fallback, deployments, form)
            decoding = decoder(form.encoding, sample_rate=form.sample_rate, channels=form.channels)
            try:
                deployment, attempts = await line.open()
                purse.deployments = (deployment,)
                tab.note(provider=deployment.provider.name, deployment=deployment.upstream_model, attempts=attempts)
                ready = dialect.ready(request_id, form, deployment.provider.name, tuple(extra))
                yield Session(
                    transcriber=self.transcriber,
                    deployment=deployment,
                    ready=ready,
                    tab=tab,
                    purse=purse,
                    line=line,
                    decoding=decoding,
                    max_seconds=self.max_seconds,
                )
            finally:
                if decoding.blocks:
                    await asyncio.to_thread(decoding.close)
                await line.close()


@dataclass(kw_only=True, eq=False)
class Session:
    transcriber: Transcriber
    deployment: Deployment
    ready: dict[str, Any]
    tab: Tab
    purse: _Purse
    line: _Line
    decoding: Decoder
    max_seconds: float
    _begun: float = field(default_factory=time.monotonic, init=False)
    _finals: list[str] = field(default_factory=list, init=False)
    _given: int = field(default=0, init=False)  # bytes
    _account: dict[str, Any] | None = field(default=None, init=False)

    async def run(self, socket: Socket, restart: asyncio.Event) -> int:
        """The code to close with. Raises `ClientGone`."""
        listening = asyncio.create_task(self._listen(socket))
        telling = asyncio.create_task(self._tell(socket))
        restarting = asyncio.create_task(restart.wait())
        tasks = (listening, telling, restarting)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            failure = next(filter(None, map(self._failure, done)), None)
            code = _code(failure) if failure or listening.done() else RESTART
            listening.cancel()
            if not telling.done():  # what was paid for is told, whatever ended the session
                unfinished = await self._finish(socket, telling)
                failure = failure or unfinished
            account = await self._settle(failure)
            if failure is None:
                await socket.tell(dialect.done(self._finals, self.ready["language"], account))
            else:
                code = _code(failure)
                await socket.tell(dialect.error(failure, account=account))
            return code
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            if self._account is None:
                await self._settle(ClientGone("The client hung up."))

    def _failure(self, task: asyncio.Task[Any]) -> VoxgateError | None:
        """What the client is to see of it. Raises `ClientGone`."""
        match task.exception():
            case ClientGone() as error:
                raise error
            case VoxgateError() as error:
                return error
            case ProviderError():
                return ProviderUnavailable("The recognizer was lost; open another session.")
            case UnusableAudio() as error:
                return InvalidInput(str(error), param="encoding")
            case None:
                return None
            case error:  # the entry point: the client gets the envelope, the log the traceback
                session = self.ready["session_id"]
                logger.error("session %s failed", session, exc_info=error)
                return VoxgateError(f"Something went wrong here; quote {session} when you report it.")

    async def _finish(self, socket: Socket, telling: asyncio.Task[None]) -> VoxgateError | None:
        """Has the client told what is left. Raises `ClientGone`."""

        async def rest() -> None:
            await self.line.end()
            await telling

        async def ignore() -> None:
            while True:
                await socket.receive()

        finishing, ignoring = asyncio.create_task(rest()), asyncio.create_task(ignore())
        try:
            done, _ = await asyncio.wait(
                {finishing, ignoring}, timeout=_FLUSH_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                return ProviderUnavailable("The recognizer does not come to an end.")
            return self._failure(finishing if finishing in done else ignoring)
        finally:
            finishing.cancel()
            ignoring.cancel()
            await asyncio.wait({finishing, ignoring})

    async def _listen(self, socket: Socket) -> None:
        """Until the client has said all."""
        renewed = self._begun
        await socket.tell(self.ready)
        while True:
            left = self._begun + self.max_seconds - time.monotonic()
            try:
                async with asyncio.timeout(min(_IDLE_SECONDS, left)):
                    message = await socket.receive()
            except TimeoutError as error:
                if left < _IDLE_SECONDS:
                    raise self._too_long() from error
                idle = f"No message came for {_IDLE_SECONDS:g} seconds; send 'keepalive' where there is no audio."
                raise RequestTimeout(idle) from error
            if isinstance(message, bytes):
                await self._hear(self.decoding.push(message))
            elif await self._said(socket, message) is dialect.Word.CLOSE:
                await self._hear(self.decoding.end())
                return
            if time.monotonic() > renewed + _RENEW_SECONDS:
                renewed = time.monotonic()
                await self.tab.extend(0, tenths=0)

    async def _said(self, socket: Socket, text: str) -> dialect.Word | None:
        try:
            word = dialect.word(text)
        except InvalidInput as error:
            await socket.tell(dialect.error(error))
            return None
        if word is dialect.Word.FINALIZE:
            await self.line.finalize()
        return word

    async def _hear(self, pieces: Iterator[bytes]) -> None:
        while True:
            pcm = await asyncio.to_thread(next, pieces, None) if self.decoding.blocks else next(pieces, None)
            if pcm is None:
                return
            await self._give(pcm)

    async def _give(self, pcm: bytes) -> None:
        at = 0
        while at < len(pcm):
            # Within one tenth of a second, since that is what is paid for.
            piece = pcm[at : at + _PIECE - self._given % _PIECE]
            at += len(piece)
            seconds = (self._given + len(piece)) / _SECOND
            if seconds > self.max_seconds:
                raise self._too_long()
            await self.purse.cover(started_tenths(seconds))
            ahead = seconds - _BURST_SECONDS - _MOST_SPEED * (time.monotonic() - self._begun)
            if ahead > 0:
                await asyncio.sleep(ahead / _MOST_SPEED)
            self._given += len(piece)
            await self.line.feed(piece)

    async def _tell(self, socket: Socket) -> None:
        async for heard in self.line.heard():
            if text := heard.segment.text.strip():
                if heard.final:
                    self._finals.append(text)
                await socket.tell(dialect.heard(heard))

    async def _settle(self, failure: VoxgateError | None) -> dict[str, Any]:
        given = self._given / _SECOND
        # What we or a recognizer failed to make of it, nobody pays for.
        owed = given if failure is None or failure.status < 500 else min(self.line.final_until, given)
        self.tab.note(status=failure.status if failure else 200)
        self._account = {}
        if owed:
            reply = await self.transcriber.charge(self.tab, self.deployment, owed, Reply({}, b""))
        else:
            reply = await self.tab.settle(0, Reply({}, b""))
        billed = self.deployment.billable(owed) / 10 if owed else 0.0
        self._account = dialect.account(given, billed, reply.headers)
        return self._account

    def _too_long(self) -> RequestTimeout:
        return RequestTimeout(f"A session lasts {self.max_seconds:g} seconds at most; open another one.")


def _code(failure: VoxgateError | None) -> int:
    if failure is None or isinstance(failure, InsufficientQuota):
        return NORMAL
    return INTERNAL_ERROR if failure.status == VoxgateError.status else 4000 + failure.status


@dataclass(eq=False)
class _Purse:
    """What a session has set aside."""

    tab: Tab
    deployments: tuple[Deployment, ...]
    _covered: int = 0  # tenths
    _held: int | None = None

    async def cover(self, tenths: int) -> None:
        """Of audio, in all. Raises `InsufficientQuota`, `RateLimited`."""
        if tenths > self._covered:
            try:
                await self._take(max(tenths, self._covered + _SLICE))
            except (InsufficientQuota, RateLimited):
                await self._take(tenths)

    async def _take(self, tenths: int) -> None:
        amount = max(deployment.cost(tenths / 10) for deployment in self.deployments)
        if self._held is None:
            await self.tab.hold(amount, tenths=tenths, fingerprint="")
        else:
            amount = max(amount, self._held)
            await self.tab.extend(amount - self._held, tenths=tenths - self._covered)
        self._covered, self._held = tenths, amount


@dataclass(eq=False)
class _Line:
    """A recognizer, which where it is lost is opened once more, and hears again what is not final."""

    fallback: Fallback
    deployments: tuple[Deployment, ...]
    form: dialect.LiveForm
    final_until: float = 0.0  # seconds
    _engine: LiveEngine | None = None
    _kept: bytearray = field(default_factory=bytearray)
    _kept_from: int = 0  # bytes
    _cuts: list[int] = field(default_factory=list)  # bytes, where the client has ended an utterance that is not final
    _offset: float = 0.0  # seconds, at which the recognizer's own time begins
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _again: asyncio.Task[None] | None = None
    _ended: bool = False

    async def open(self) -> tuple[Deployment, int]:
        """Who listens, and how many were asked. Raises `ProviderUnavailable`, `Overloaded`, `RateLimited`."""
        deployment, self._engine, attempts = await self.fallback.listen(
            self.deployments, language=self.form.language, interim=self.form.interim_results
        )
        self.deployments = (deployment,)
        return deployment, attempts

    async def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        if self._engine is not None:
            await self._engine.aclose()

    async def feed(self, pcm: bytes) -> None:
        self._kept += pcm
        self._drop(len(self._kept) - _KEPT)
        await self._do(lambda engine: engine.feed(pcm))

    async def finalize(self) -> None:
        self._cuts.append(self._kept_from + len(self._kept))
        await self._do(lambda engine: engine.finalize())

    async def end(self) -> None:
        self._ended = True
        await self._do(lambda engine: engine.end())

    async def heard(self) -> AsyncIterator[Heard]:
        """Until the end. Raises `ProviderError` where it was lost twice."""
        while self._engine is not None:
            engine, offset = self._engine, self._offset
            try:
                async for heard in engine.heard():
                    segment = heard.segment.moved(offset)
                    if heard.final:
                        self.final_until = segment.end
                        self._drop(int(segment.end * _SECOND) // 2 * 2 - self._kept_from)
                    yield Heard(segment, heard.final)
            except ProviderError as error:
                await self._reopen(engine, error)
            else:
                return

    async def _do(self, work: Callable[[LiveEngine], Awaitable[None]]) -> None:
        """What is noted already, and so done again where the recognizer is lost with it."""
        if self._again is not None:
            await asyncio.shield(self._again)
        engine = self._engine
        assert engine is not None, "it is open"
        try:
            await work(engine)
        except ProviderError as error:
            await self._reopen(engine, error)

    async def _reopen(self, lost: LiveEngine, error: ProviderError) -> None:
        async with self._opening:
            if self._engine is not lost:
                return
            if self._again is not None:
                raise error
            logger.warning("a recognizer was lost (%s); it is opened once more", error.message)
            await lost.aclose()
            try:
                await self.open()
            except VoxgateError as refused:
                raise error from refused
            self._offset = self._kept_from / _SECOND
            cuts = [cut - self._kept_from for cut in self._cuts if cut > self._kept_from]
            self._again = asyncio.create_task(self._tell_again(bytes(self._kept), cuts))

    async def _tell_again(self, kept: bytes, cuts: list[int]) -> None:
        engine = self._engine
        assert engine is not None, "it is open"
        with contextlib.suppress(ProviderError):  # whoever hears it knows
            for start, end in itertools.pairwise([0, *cuts, len(kept)]):
                for at in range(start, end, _PIECE):
                    await engine.feed(kept[at : min(at + _PIECE, end)])
                if end in cuts:
                    await engine.finalize()
            if self._ended:
                await engine.end()

    def _drop(self, count: int) -> None:
        count = min(max(count, 0), len(self._kept))
        del self._kept[:count]
        self._kept_from += count
        self._cuts = [cut for cut in self._cuts if cut > self._kept_from]
