"""One deployment after the other until one answers, within one deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from voxgate.catalog import Deployment
from voxgate.errors import (
    FailureClass,
    InvalidInput,
    Overloaded,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    TooLarge,
    VoxgateError,
)
from voxgate.metrics import Metrics
from voxgate.model import Delta, Transcript
from voxgate.providers import Ask, LiveEngine, Provider
from voxgate.providers.prepare import Prepared
from voxgate.routing.health import Health
from voxgate.tasks import given_up

logger = logging.getLogger(__name__)

Heard = Callable[[Delta], Awaitable[None]]
_PAUSE = (0.05, 0.25)  # seconds before the one retry, at random between these
_LEARN_SECONDS = 30.0
_LEARN_TIMEOUT = 1.0
_FAIR_SECONDS = 10.0  # who says nothing for so long is failing, however long it may take
_FAIR_SHARE = 0.9  # who had less of its time, because of a slow reader, is not to blame for using it up
_LIMITED = 5.0  # seconds to leave a deployment alone that is at its limit and does not say for how long


@dataclass(frozen=True, slots=True)
class Served:
    """`latency` is the seconds that the attempt which served took, `attempts` how many there were;
    `converted` is the container that the audio was made into for it."""

    deployment: Deployment
    transcript: Transcript
    latency: float
    attempts: int
    converted: str | None


@dataclass(frozen=True, slots=True)
class _Failure:
    """`wait` is the seconds after which another attempt may be made, and `message` what our own engine says to it."""

    deployment: Deployment
    failure: FailureClass
    status: int | None
    wait: float | None = None
    message: str = ""

    def __str__(self) -> str:
        status = f" ({self.status})" if self.status else ""
        return f"{self.deployment.provider.name}: {self.failure}{status}"


@dataclass(slots=True)
class _Attempt:
    """`fair` where failing it says something of the deployment. `latency` and the audio's `duration` are in seconds."""

    fair: bool = True
    latency: float | None = None
    duration: float = 0.0
    failure: _Failure | None = None


class Outages(Protocol):
    """Where processes tell each other which deployments are out of order: a `Store`."""

    async def outages(self) -> dict[str, float]: ...

    async def report_outage(self, deployment: str, until: float) -> None: ...


class _Reader:
    """Who reads what one attempt hears. The time that this takes puts the attempt's end off, as far as to `latest`;
    what is beyond that it `took` from the provider. All in seconds."""

    def __init__(self, latest: float) -> None:
        self._latest = latest
        self.waited = self.took = 0.0

    def of(self, heard: Heard, timeout: asyncio.Timeout) -> Heard:
        clock, end = asyncio.get_running_loop().time, timeout.when() or 0.0

        async def told(delta: Delta) -> None:
            begun = clock()
            timeout.reschedule(self._latest)
            try:
                await heard(delta)
            finally:
                self.waited += clock() - begun
                self.took = max(end + self.waited - self._latest, 0.0)
            timeout.reschedule(min(end + self.waited, self._latest))

        return told


@dataclass(kw_only=True, eq=False)
class Fallback:
    """`provider_timeout` bounds one attempt and `request_timeout` all of them, in seconds."""

    providers: Mapping[str, Provider]
    health: Health
    outages: Outages | None
    metrics: Metrics = field(default_factory=Metrics)
    provider_timeout: float
    request_timeout: float
    uniform: Callable[[float, float], float] = random.uniform
    _learned: float = field(default=-math.inf, init=False)

    async def serve(
        self,
        prepared: Prepared,
        deployments: tuple[Deployment, ...],
        *,
        attempted: Callable[[int, Deployment], None],
        told: Callable[[], bool] = lambda: False,
        seconds: float = math.inf,
    ) -> Served:
        """Each deployment has its share of what is left of the time, of which a client may give less: so many
        `seconds`. Raises `InvalidInput` where a provider finds fault with the request, `RateLimited` or
        `Overloaded` where all are at their limits, and else `ProviderUnavailable` with what each came to."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + min(self.request_timeout, seconds)
        failures: list[_Failure] = []
        left, put_off = deque(deployments), set[Deployment]()
        attempts = 0
        while left:
            deployment = left.popleft()
            # What is at its limit is not asked at all: it said when to come back.
            if wait := self.health.limited_for(deployment.id):
                failures.append(_Failure(deployment, FailureClass.RATE_LIMIT, None, wait))
                continue
            if left and deployment not in put_off and not self.health.available(deployment.id):
                put_off.add(deployment)  # out of order since it was chosen
                left.append(deployment)
                continue
            until = clock() + (deadline - clock()) / (len(left) + 1)
            for retry in (False, True):
                pause = self.uniform(*_PAUSE) if retry else 0.0
                if clock() + pause >= until:
                    break
                if retry:  # else nothing may come between the look at the breaker and the attempt
                    await asyncio.sleep(pause)
                attempts += 1
                attempted(attempts, deployment)
                outcome = await self._ask(prepared, deployment, until, deadline, attempts)
                if isinstance(outcome, Served):
                    return outcome
                failures.append(outcome)
                if told():  # nobody else can go on from there
                    raise _unavailable(failures)
                if outcome.failure is not FailureClass.TRANSIENT or not self.health.available(deployment.id):
                    break
        raise _unavailable(failures)

    async def listen(
        self, deployments: tuple[Deployment, ...], *, language: str | None, interim: bool
    ) -> tuple[Deployment, LiveEngine, int]:
        """The first that takes live speech, and how many were asked. Raises as `serve` does."""
        failures: list[_Failure] = []
        for number, deployment in enumerate(deployments, 1):
            if wait := self.health.limited_for(deployment.id):
                failures.append(_Failure(deployment, FailureClass.RATE_LIMIT, None, wait))
                continue
            async with self._attempt(deployment) as attempt, asyncio.timeout(self.provider_timeout):
                provider = self.providers[deployment.provider.name]
                engine = await provider.listen(Ask(deployment, language, interim))
            if attempt.failure is None:
                return deployment, engine, number
            failures.append(attempt.failure)
        raise _unavailable(failures)

    async def _ask(
        self, prepared: Prepared, deployment: Deployment, until: float, deadline: float, number: int
    ) -> Served | _Failure:
        clock = asyncio.get_running_loop().time
        reader = _Reader(deadline)
        async with self._attempt(deployment) as attempt:
            attempt.fair = False
            async with asyncio.timeout_at(until):
                call = await prepared.call(deployment)
            attempt.fair, begun = True, clock()
            limit = min(self.provider_timeout, until - begun)
            try:
                async with asyncio.timeout(limit) as timeout:
                    reading = replace(call, left=limit, heard=reader.of(call.heard, timeout) if call.heard else None)
                    transcript = await self.providers[deployment.provider.name].transcribe(reading)
            except TimeoutError:
                # That it had no time says nothing of it.
                attempt.fair = limit >= min(self.provider_timeout, _FAIR_SECONDS)
                attempt.fair = attempt.fair and limit - reader.took > _FAIR_SHARE * limit
                raise
            attempt.latency, attempt.duration = clock() - begun - reader.waited, call.duration
        if attempt.failure is not None:
            return attempt.failure
        converted = call.container.name if call.container != prepared.container else None
        return Served(deployment, transcript, attempt.latency or 0.0, number, converted)

    @contextlib.asynccontextmanager
    async def _attempt(self, deployment: Deployment) -> AsyncIterator[_Attempt]:
        """How it ends goes to the deployment's health, and its failure no further. Raises `InvalidInput` where the
        provider finds fault with the request."""
        begun, judged = self.health.begin(deployment.id), False
        attempt = _Attempt()
        try:
            yield attempt
        except Overloaded as error:
            overloaded = FailureClass.OVERLOADED
            attempt.failure = _Failure(deployment, overloaded, 503, float(error.retry_after), error.message)
        except (ProviderError, TimeoutError) as error:
            if given_up():
                raise asyncio.CancelledError from error
            if isinstance(error, TimeoutError):
                error = ProviderError(FailureClass.TRANSIENT, "timed out")
            if error.failure is FailureClass.CALLER_FAULT:
                kind = TooLarge if error.status == 413 else InvalidInput
                raise kind(error.message, param=error.param) from error
            # Its words are not logged: a provider may quote what it heard.
            why = type(error.__cause__).__name__ if error.__cause__ else ""
            logger.warning("%s failed: %s (%s) %s", deployment.id, error.failure, error.status, why)
            self.metrics.add("ProviderFailures", provider=deployment.provider.name)
            judged = attempt.fair and error.failure is not FailureClass.UNSUPPORTED
            wait = None
            if judged and error.failure is FailureClass.RATE_LIMIT:
                wait = _LIMITED if error.retry_after is None else float(error.retry_after)
                self.health.limited(deployment.id, begun, wait)
            elif judged and self.health.failed(deployment.id, begun):
                logger.warning("%s is left alone for a while", deployment.id)
                await self._report(deployment)
            attempt.failure = _Failure(deployment, error.failure, error.status, wait)
        else:
            judged = True
            if self.health.succeeded(deployment.id, begun, latency=attempt.latency, duration=attempt.duration):
                if attempt.latency is not None:  # of recordings
                    logger.info("%s serves again", deployment.id)
                await self._report(deployment)
        finally:
            if not judged:  # given up, or the caller's fault: neither says anything of the deployment
                self.health.ended(deployment.id, begun)

    async def learn(self) -> None:
        """Once in a while, before deployments are chosen: what other processes found out, so that not each has to."""
        now = asyncio.get_running_loop().time()
        if self.outages is not None and now >= self._learned + _LEARN_SECONDS:
            self._learned = now
            try:
                async with asyncio.timeout(_LEARN_TIMEOUT):
                    self.health.learn(await self.outages.outages())
            except Exception:  # whatever the store has: nobody is to go without an answer for this
                logger.exception("what others know of the deployments cannot be had")

    async def _report(self, deployment: Deployment) -> None:
        if self.outages is not None:
            try:
                await self.outages.report_outage(deployment.id, self.health.report(deployment.id).until or 0.0)
            except Exception:  # likewise
                logger.exception("the others cannot be told of %s", deployment.id)


def _unavailable(failures: list[_Failure]) -> VoxgateError:
    each = "; ".join(str(failure) for failure in failures)
    waits = [failure.wait for failure in failures if failure.wait is not None]
    if len(waits) == len(failures) and failures:
        shortest = max(min(waits), 1.0)
        if all(failure.failure is FailureClass.OVERLOADED for failure in failures):
            soonest = min(failures, key=lambda failure: failure.wait or 0.0)
            return Overloaded(soonest.message, retry_after=-int(-shortest // 1))
        return RateLimited(f"Every provider for this model is at its limit ({each}).", wait=shortest)
    return ProviderUnavailable(f"Every provider for this model failed ({each or 'no time was left'}).")
