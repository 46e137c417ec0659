"""What the operator's dashboard and alarms are made of, in CloudWatch's embedded metric format.

Values are gathered, and written a line at a time for each dimension when they are flushed, so that a
request costs no line of its own. Their names and units are those of `infra/constructs/metrics.py`.
https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

UNITS = {
    "Requests": "Count",
    "Errors": "Count",
    "ProviderUnavailable": "Count",
    "Latency": "Milliseconds",
    "StageLatency": "Milliseconds",
    "ProviderFailures": "Count",
    "AudioSeconds": "Seconds",
    "RevenueMicrodollars": "None",
    "CostMicrodollars": "None",
    "LedgerDifference": "None",
    "QueuedAudioSeconds": "Seconds",
    "GpuUtilization": "Percent",
    "GpuMemoryUtilization": "Percent",
}
_MOST_VALUES = 100  # in one array


class Metrics:
    """Of one process. Without an `environment` nothing is gathered and nothing written."""

    def __init__(
        self,
        environment: str = "",
        *,
        write: Callable[[str], object] = lambda line: print(line, flush=True),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._environment = environment
        self._write = write
        self._clock = clock
        self._values: defaultdict[tuple[str, str], defaultdict[str, list[float]]]
        self._values = defaultdict(lambda: defaultdict(list))

    def add(self, name: str, value: float = 1, **dimension: str) -> None:
        """A value of a metric in `UNITS`; `dimension` is one more by which to tell it apart, if any."""
        if self._environment:
            key = next(iter(dimension.items()), ("", ""))
            values = self._values[key][name]
            values.append(value)
            if len(values) >= _MOST_VALUES:
                self.flush()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Takes the time of a part of a request."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add("StageLatency", (time.perf_counter() - begun) * 1000, stage=name)

    def flush(self) -> None:
        gathered, self._values = self._values, defaultdict(lambda: defaultdict(list))
        for (name, value), values in gathered.items():
            dimensions = [["environment"], *([["environment", name]] if name else [])]
            told = [{"Name": metric, "Unit": UNITS[metric]} for metric in values]
            directive = {"Namespace": "Voxgate", "Dimensions": dimensions, "Metrics": told}
            metadata = {"Timestamp": int(self._clock() * 1000), "CloudWatchMetrics": [directive]}
            own = {name: value} if name else {}
            self._write(json.dumps({"_aws": metadata, "environment": self._environment, **own, **values}))

    async def flush_forever(self, every: float = 10.0) -> None:
        try:
            while True:
                await asyncio.sleep(every)
                self.flush()
        finally:
            self.flush()
