"""One deployment after the other until one answers, within one deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from voxgate.catalog import Deployment
from voxgate.errors import (
    FailureClass,
    InvalidInput,
    Overloaded,
    ProviderError,
    ProviderUnavailable,
    RateLimited,
    VoxgateError,
)
from voxgate.model import Transcript
from voxgate.providers import Provider
from voxgate.providers.prepare import Prepared
from voxgate.routing.health import Health

logger = logging.getLogger(__name__)

_PAUSE = (0.05, 0.25)  # seconds before the one retry, at random between these
_LEARN_SECONDS = 30.0
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
    deployment: Deployment
    failure: FailureClass
    status: int | None
    wait: float | None = None

    def __str__(self) -> str:
        status = f" ({self.status})" if self.status else ""
        return f"{self.deployment.provider.name}: {self.failure}{status}"


class Outages(Protocol):
    """Where processes tell each other which deployments are out of order: a `Store`."""

    async def outages(self) -> dict[str, float]: ...

    async def report_outage(self, deployment: str, until: float) -> None: ...


class Fallback:
    """`provider_timeout` bounds one attempt and `request_timeout` all of them, in seconds."""

    def __init__(
        self,
        *,
        providers: Mapping[str, Provider],
        health: Health,
        outages: Outages | None,
        provider_timeout: float,
        request_timeout: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._providers = providers
        self._health = health
        self._outages = outages
        self._asked = 0.0
        self._provider_timeout = provider_timeout
        self._request_timeout = request_timeout
        self._uniform = uniform

    async def serve(
        self, prepared: Prepared, deployments: tuple[Deployment, ...], *, attempted: Callable[[int], None]
    ) -> Served:
        """Raises `InvalidInput` where a provider finds fault with the request, `RateLimited` or `Overloaded`
        where all are at their limits, and else `ProviderUnavailable` with what each attempt came to."""
        deadline = asyncio.get_running_loop().time() + self._request_timeout
        failures: list[_Failure] = []
        attempts = 0
        # What is at its limit is not asked at all: it said when to come back.
        for deployment in deployments:
            wait = self._health.limited_for(deployment.id)
            if wait:
                failures.append(_Failure(deployment, FailureClass.RATE_LIMIT, None, wait))
                continue
            for retry in (False, True):
                left = deadline - asyncio.get_running_loop().time()
                pause = self._uniform(*_PAUSE) if retry else 0.0
                if pause >= left:
                    raise _unavailable(failures)
                await asyncio.sleep(pause)
                attempts += 1
                attempted(attempts)
                outcome = await self._attempt(prepared, deployment, deadline, attempts)
                if isinstance(outcome, Served):
                    return outcome
                failures.append(outcome)
                if outcome.failure is not FailureClass.TRANSIENT or not self._health.available(deployment.id):
                    break
        raise _unavailable(failures)

    async def _attempt(
        self, prepared: Prepared, deployment: Deployment, deadline: float, number: int
    ) -> Served | _Failure:
        clock = asyncio.get_running_loop().time
        provider = self._providers[deployment.provider.name]
        begun = clock()
        async with self._watched(deployment):
            try:
                async with asyncio.timeout_at(min(begun + self._provider_timeout, deadline)):
                    call = await prepared.call(deployment)
                    begun = clock()
                    transcript = await provider.transcribe(call)
            except TimeoutError:
                return await self._failed(deployment, ProviderError(FailureClass.TRANSIENT, "timed out"))
            except Overloaded as error:
                self._health.ended(deployment.id)
                return _Failure(deployment, FailureClass.OVERLOADED, 503, float(error.retry_after))
            except ProviderError as error:
                if error.failure is FailureClass.CALLER_FAULT:
                    raise InvalidInput(error.message, param=error.param) from error
                return await self._failed(deployment, error)
            latency = clock() - begun
            if self._health.succeeded(deployment.id, latency=latency, duration=call.duration):
                logger.info("%s serves again", deployment.id)
                await self._report(deployment)
        converted = call.container.name if call.container != prepared.container else None
        return Served(deployment, transcript, latency, number, converted)

    @contextlib.asynccontextmanager
    async def _watched(self, deployment: Deployment) -> AsyncIterator[None]:
        self._health.begin(deployment.id)
        try:
            yield
        except BaseException:  # given up, or the caller's fault: neither says anything of the deployment
            self._health.ended(deployment.id)
            raise

    async def learn(self) -> None:
        """Once in a while, before deployments are chosen: what other processes found out, so that not each has to."""
        now = asyncio.get_running_loop().time()
        if self._outages is not None and now >= self._asked + _LEARN_SECONDS:
            self._asked = now
            try:
                self._health.learn(await self._outages.outages())
            except Exception:  # whatever the store has: nobody is to go without an answer for this
                logger.exception("what others know of the deployments cannot be had")

    async def _report(self, deployment: Deployment) -> None:
        if self._outages is not None:
            try:
                await self._outages.report_outage(deployment.id, self._health.report(deployment.id).until or 0.0)
            except Exception:  # likewise
                logger.exception("the others cannot be told of %s", deployment.id)

    async def _failed(self, deployment: Deployment, error: ProviderError) -> _Failure:
        # Its words are not logged: a provider may quote what it heard.
        logger.warning("%s failed: %s (%s)", deployment.id, error.failure, error.status)
        if error.failure is FailureClass.RATE_LIMIT:
            wait = _LIMITED if error.retry_after is None else float(error.retry_after)
            self._health.limited(deployment.id, wait)
            return _Failure(deployment, error.failure, error.status, wait)
        if error.failure is FailureClass.UNSUPPORTED:
            self._health.ended(deployment.id)
        elif self._health.failed(deployment.id):
            logger.warning("%s is left alone for a while", deployment.id)
            await self._report(deployment)
        return _Failure(deployment, error.failure, error.status)


def _unavailable(failures: list[_Failure]) -> VoxgateError:
    each = "; ".join(str(failure) for failure in failures)
    waits = [failure.wait for failure in failures if failure.wait is not None]
    if len(waits) == len(failures) and failures:
        shortest = max(min(waits), 1.0)
        if all(failure.failure is FailureClass.OVERLOADED for failure in failures):
            return Overloaded("The queue is full; try again.", retry_after=-int(-shortest // 1))
        return RateLimited(f"Every provider for this model is at its limit ({each}).", wait=shortest)
    return ProviderUnavailable(f"Every provider for this model failed ({each or 'no time was left'}).")
