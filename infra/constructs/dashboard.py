"""The one page to look at: what customers ask and feel, the money, the queue, and the machines."""

from __future__ import annotations

from collections.abc import Sequence

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from constructs import Construct

from infra.constructs.api import Api
from infra.constructs.data import Data
from infra.constructs.inference import Inference
from infra.constructs.ingress import Ingress
from infra.constructs.metrics import by_dimension, reported
from infra.constructs.sweeper import Sweeper
from infra.environments import Environment

_FIVE = cdk.Duration.minutes(5)


class Dashboard(Construct):
    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        environment: Environment,
        api: Api,
        sweeper: Sweeper,
        data: Data,
        ingress: Ingress | None,
        inference: Inference | None,
        alarms: Sequence[cloudwatch.IAlarm],
        unclosed: cloudwatch.IMetric,
    ) -> None:
        super().__init__(scope, id)
        self._environment = environment
        page = cloudwatch.Dashboard(
            self, "Page", dashboard_name=f"voxgate-{environment.name}", default_interval=cdk.Duration.hours(12)
        )
        page.add_widgets(cloudwatch.AlarmStatusWidget(title="Alarms", alarms=list(alarms), width=24, height=3))
        page.add_widgets(
            self._search("Requests by contract", "Requests"),
            self._search("Errors by code", "Errors"),
            self._graph("Answers of API Gateway", *_answers(api)),
        )
        page.add_widgets(
            self._graph(
                "Latency, ms",
                *(reported(environment, "Latency", statistic=s, minutes=5, label=s) for s in ("p50", "p95", "p99")),
            ),
            self._search("Latency by stage, p95, ms", "StageLatency", statistic="p95"),
            self._search("Failed attempts by provider", "ProviderFailures"),
        )
        page.add_widgets(
            self._search("Audio seconds by provider", "AudioSeconds"),
            self._search("Revenue by provider, $", "RevenueMicrodollars", divisor=1_000_000),
            self._search("Cost by provider, $", "CostMicrodollars", divisor=1_000_000),
        )
        page.add_widgets(
            self._graph(
                "Ledger",
                reported(environment, "LedgerDifference", statistic="Maximum", minutes=5, label="difference, µ$"),
                unclosed,
            ),
            self._graph(
                "Sweeper",
                sweeper.function.metric_invocations(statistic="Sum", period=_FIVE),
                sweeper.function.metric_errors(statistic="Sum", period=_FIVE),
                sweeper.function.metric_duration(statistic="Maximum", period=_FIVE),
            ),
            self._graph("Table's throttled writes and reads", *_throttled(data)),
        )
        if ingress:
            page.add_widgets(*self._ingress(ingress))
        if inference:
            page.add_widgets(*self._inference(inference))

    def _ingress(self, ingress: Ingress) -> list[cloudwatch.IWidget]:
        counts = ingress.load_balancer.metrics
        return [
            self._graph(
                "Ingress: requests and connections",
                counts.request_count(period=_FIVE),
                counts.active_connection_count(period=_FIVE),
            ),
            self._graph(
                "Ingress: time until an answer begins, s",
                *(counts.target_response_time(statistic=s, period=_FIVE, label=s) for s in ("p50", "p95")),
            ),
            self._graph(
                "Ingress: CPU and memory, percent",
                ingress.service.metric_cpu_utilization(period=_FIVE),
                ingress.service.metric_memory_utilization(period=_FIVE),
            ),
        ]

    def _inference(self, inference: Inference) -> list[cloudwatch.IWidget]:
        environment = self._environment
        return [
            self._graph(
                "Queue: audio seconds of each task",
                *(reported(environment, "QueuedAudioSeconds", statistic=s, label=s) for s in ("Average", "Maximum")),
            ),
            self._graph(
                "GPU and its memory, percent",
                *(
                    reported(environment, name, statistic="Average", label=name)
                    for name in ("GpuUtilization", "GpuMemoryUtilization")
                ),
            ),
            self._graph(
                "Inference: requests, and those that found nobody",
                inference.load_balancer.metrics.request_count(period=_FIVE),
                inference.unserved(period=_FIVE),
            ),
        ]

    def _graph(self, title: str, *metrics: cloudwatch.IMetric) -> cloudwatch.IWidget:
        return cloudwatch.GraphWidget(title=title, left=list(metrics), width=8, height=6)

    def _search(self, title: str, name: str, *, statistic: str = "Sum", divisor: int = 1) -> cloudwatch.IWidget:
        return self._graph(title, by_dimension(self._environment, name, statistic=statistic, divisor=divisor))


def _answers(api: Api) -> list[cloudwatch.IMetric]:
    return [
        api.rest_api.metric_count(statistic="Sum", period=_FIVE),
        api.rest_api.metric_client_error(statistic="Sum", period=_FIVE),
        api.rest_api.metric_server_error(statistic="Sum", period=_FIVE),
    ]


def _throttled(data: Data) -> list[cloudwatch.IMetric]:
    return [
        cloudwatch.Metric(
            namespace="AWS/DynamoDB",
            metric_name=name,
            dimensions_map={"TableName": data.table.table_name},
            statistic="Sum",
            period=_FIVE,
        )
        for name in ("WriteThrottleEvents", "ReadThrottleEvents")
    ]
