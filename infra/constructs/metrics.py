"""The metrics that the runtime reports itself, in embedded metric format on its standard output.

All are in the namespace `Voxgate`, with the dimension `environment`, and some of them once more with a second
dimension. What AWS measures (status codes, invocations) is not reported again.

    metric                 unit          and by    reported
    Requests               Count         contract  by a gateway, once for each request
    Errors                 Count         code      once for each failure, by the code in its envelope
    ProviderUnavailable    Count                   1 for a request that no provider could serve
    Latency                Milliseconds            of the whole request
    StageLatency           Milliseconds  stage     of receive, understand, hold, attempt, settle
    ProviderFailures       Count         provider  once for each failed attempt
    AudioSeconds           Seconds       provider  billable ones
    RevenueMicrodollars    None          provider  what the customer was charged
    CostMicrodollars       None          provider  what the provider charges
    LedgerDifference       None                    by the audit: how far all balances are off, in all; 0 too
    QueuedAudioSeconds     Seconds                 by an inference task, each minute: waiting or at work; 0 too
    GpuUtilization         Percent                 by an inference task, each minute
    GpuMemoryUtilization   Percent                 by an inference task, each minute
"""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch

from infra.environments import Environment

NAMESPACE = "Voxgate"
REPORTED = {
    "Requests": "contract",
    "Errors": "code",
    "ProviderUnavailable": None,
    "Latency": None,
    "StageLatency": "stage",
    "ProviderFailures": "provider",
    "AudioSeconds": "provider",
    "RevenueMicrodollars": "provider",
    "CostMicrodollars": "provider",
    "LedgerDifference": None,
    "QueuedAudioSeconds": None,
    "GpuUtilization": None,
    "GpuMemoryUtilization": None,
}


def reported(
    environment: Environment, name: str, *, statistic: str, minutes: int = 1, label: str | None = None
) -> cloudwatch.Metric:
    if name not in REPORTED:
        raise ValueError(f"The runtime reports no metric '{name}'.")
    return cloudwatch.Metric(
        namespace=NAMESPACE,
        metric_name=name,
        dimensions_map={"environment": environment.name},
        statistic=statistic,
        period=cdk.Duration.minutes(minutes),
        label=label,
    )


def by_dimension(environment: Environment, name: str, *, statistic: str, divisor: int = 1) -> cloudwatch.MathExpression:
    """One line for each value of the metric's second dimension; for a dashboard, since no alarm takes it."""
    dimension = REPORTED[name]
    if dimension is None:
        raise ValueError(f"'{name}' has no second dimension.")
    found = (
        f"SEARCH('{{{NAMESPACE},environment,{dimension}}} "
        f'MetricName="{name}" environment="{environment.name}"\', \'{statistic}\', 300)'
    )
    return cloudwatch.MathExpression(
        expression=found if divisor == 1 else f"{found} / {divisor}",
        using_metrics={},
        label=f"${{PROP('Dim.{dimension}')}}",
        period=cdk.Duration.minutes(5),
    )


def queued_audio(environment: Environment) -> cloudwatch.Metric:
    """The average of the tasks': what one of them has before it."""
    return reported(environment, "QueuedAudioSeconds", statistic="Average")
