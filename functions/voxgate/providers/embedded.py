"""The engine of this machine, in worker processes."""

from __future__ import annotations

from voxgate.engines import Job, Pool
from voxgate.model import Capabilities, Delta, Segment, Transcript
from voxgate.providers import Ask, Call, LiveEngine


class EmbeddedProvider:
    """Implements `Provider` over engine processes."""

    def __init__(self, *, pool: Pool, max_audio_seconds: float) -> None:
        self._pool = pool
        self._max_audio_seconds = max_audio_seconds
        self.queued_seconds = 0.0  # of audio, waiting or at work

    async def capabilities(self, model: str) -> Capabilities:
        return (await self._pool.start()).capabilities(model)

    async def transcribe(self, call: Call) -> Transcript:
        request = call.request
        job = Job(
            path=str(call.audio.path()),
            container=call.container.demuxer,
            max_seconds=self._max_audio_seconds,
            language=request.language,
            prompt=request.prompt,
            temperature=request.temperature,
            words=request.words,
            translate=request.translate,
            keywords=request.keywords,
            model=call.deployment.upstream_model,
            seconds=call.duration,
            left=call.left,
            priority=request.priority,
        )

        async def heard(segment: Segment) -> None:
            if call.heard is not None:
                await call.heard(Delta(segment.text, segment.end, segment))

        self.queued_seconds += call.duration
        try:
            language, segments = await self._pool.recognize(job, heard)
        finally:
            self.queued_seconds -= call.duration
        words = None
        if request.words:
            words = tuple(word for segment in segments for word in segment.words or ())
        return Transcript(
            text="".join(segment.text for segment in segments).strip(),
            duration=call.duration,
            language=language,
            segments=segments,
            words=words,
        )

    async def listen(self, ask: Ask) -> LiveEngine:
        return await self._pool.live.listen(ask.language, model=ask.deployment.upstream_model, interim=ask.interim)

    async def close(self) -> None:
        await self._pool.close()
