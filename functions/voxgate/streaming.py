"""A transcript while it is made: what is heard goes out piece by piece, to a client that asked for that.

The answer is the same events in one body, for whoever has the request answered again, and for hosts that
cannot send anything before the end.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace

from voxgate.dialects import StreamingDialect
from voxgate.errors import ClientGone
from voxgate.formats import event
from voxgate.model import Delta, Logprob, Outcome

_AHEAD = 16  # events that wait for a slow reader before the recognizer does
_HEARTBEAT = b": still listening\n\n"
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


class Events:
    """What is on its way to one client, whose host sends it `live` or not at all. `wanted` once the client
    turned out to want it, `begun` once there is something, which `headers` go before. `close` ends it; until
    then `parts` waits."""

    def __init__(self, *, live: bool) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(_AHEAD)
        self.live = live
        self.wanted = False
        self.headers: dict[str, str] = {}
        self.begun = asyncio.Event()

    async def put(self, part: bytes) -> None:
        if self.live:
            self.begun.set()
            await self._queue.put(part)

    async def parts(self, *, heartbeat: float) -> AsyncIterator[bytes]:
        """With a comment in each `heartbeat` seconds of silence, so that nobody on the way hangs up."""
        while True:
            try:
                async with asyncio.timeout(heartbeat):
                    part = await self._queue.get()
            except TimeoutError:
                part = _HEARTBEAT
            if part is None:
                return
            yield part

    async def close(self) -> None:
        await self._queue.put(None)


class Narrator:
    """Tells one request's transcript, such that its deltas joined are the text of its end; who speaks only
    where it is `diarized`."""

    def __init__(self, dialect: StreamingDialect, events: Events, *, diarized: bool) -> None:
        events.wanted = True
        self._diarized = diarized
        self._plain = False  # the text comes in pieces that are no segments: these come beside it
        self._dialect = dialect
        self._events = events
        self._told: list[bytes] = []
        self._text = ""
        self._kept = ""  # white space that may turn out to be at the text's end
        self._logprobs: tuple[Logprob, ...] = ()  # of what has been heard and not told
        self.heard_until = 0.0  # seconds; infinite where text came without its time

    @property
    def begun(self) -> bool:
        return bool(self._told)

    @property
    def owed_until(self) -> float:
        """Up to where a client that hangs up now has had the transcript, in seconds."""
        return self.heard_until if self._events.live else 0.0

    async def heard(self, delta: Delta) -> None:
        self._plain = self._plain or (delta.segment is None and bool(delta.text.strip()))
        new = "" if self._plain and delta.segment is not None else delta.text
        text = self._kept + new if self._text else new.lstrip()
        shown = text.rstrip()
        self._kept = text[len(shown) :]
        if delta.end is not None:
            self.heard_until = max(self.heard_until, delta.end)
        elif shown:
            self.heard_until = math.inf
        segment = delta.segment if self._diarized else None
        self._logprobs += delta.logprobs or ()
        if shown or segment is not None:
            await self._tell_delta(Delta(shown, delta.end, segment))

    async def done(self, outcome: Outcome) -> bytes:
        """Tells what has not been told, and the end; returns all of it as one body."""
        if not self._text:  # the provider does not stream: it comes all at once
            whole, at = outcome.transcript.text, 0
            for segment in outcome.transcript.segments or ():
                # As the text has it: not everybody's segments have the spaces between them.
                found = whole.find(segment.text.strip(), at)
                until = at if found < 0 else found + len(segment.text.strip())
                await self.heard(Delta(whole[at:until], segment.end, segment))
                at = until
        self.heard_until = math.inf
        if outcome.transcript.text.startswith(self._text):
            rest = outcome.transcript.text[len(self._text) :]
            if rest:
                self._kept = ""
                await self._tell_delta(Delta(rest))
        await self._tell(self._dialect.render_done(outcome, self._text, len(self._told)))
        return b"".join(self._told)

    def cut(self) -> bytes:
        """What was told before the client hung up, for the same request sent again."""
        gone = ClientGone("The client hung up here: send the request again under a new Idempotency-Key.")
        return b"".join(self._told) + event(gone.envelope())

    async def _tell_delta(self, delta: Delta) -> None:
        logprobs, self._logprobs = self._logprobs, ()
        await self._tell(self._dialect.render_delta(replace(delta, logprobs=logprobs or None), len(self._told)))
        self._text += delta.text

    async def _tell(self, body: dict[str, object] | None) -> None:
        if body is not None:
            part = event(body)
            self._told.append(part)
            await self._events.put(part)
