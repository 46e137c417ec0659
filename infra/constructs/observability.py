"""Who is paged, for what, and the dashboard to look at then."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_cloudwatch_actions as actions
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_logs as logs
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sns_subscriptions as subscriptions
from constructs import Construct

from infra.constructs.api import Api
from infra.constructs.dashboard import Dashboard
from infra.constructs.data import Data
from infra.constructs.inference import Inference
from infra.constructs.ingress import Ingress
from infra.constructs.metrics import queued_audio, reported
from infra.constructs.sweeper import Sweeper
from infra.environments import Environment

_SERVER_ERRORS = 1  # percent of the requests
_SLOW_API = 20  # seconds, of the 29 that API Gateway waits
_SLOW_INGRESS = 120  # seconds until an answer begins; long recordings take some of it by themselves
_QUEUE = 5  # times what starts another machine

_AT_LEAST = cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD
_ABOVE = cloudwatch.ComparisonOperator.GREATER_THAN_THRESHOLD
_BELOW = cloudwatch.ComparisonOperator.LESS_THAN_THRESHOLD


class Observability(Construct):
    """Alarms page for what customers feel, or for money; each says what it means, and docs/operations.md
    what to do. Where nothing is called nothing is wrong: missing data is fine, but of what runs on a schedule."""

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
    ) -> None:
        super().__init__(scope, id)
        self._environment = environment
        self.topic = self._topic()
        self.alarms: list[cloudwatch.Alarm] = []
        self._customers(api, ingress)
        self._ledger(sweeper)
        unclosed = self._unclosed(api, ingress)
        if environment.inference is not None and inference is not None:
            self._alarm(
                "QueueLong",
                "The inference tasks have far more audio before them than they should, for ten minutes: no machines "
                "are to be had, or their number is at its limit.",
                queued_audio(environment),
                threshold=_QUEUE * environment.inference.queued_seconds,
                periods=10,
            )
        self.dashboard = Dashboard(
            self,
            "Dashboard",
            environment=environment,
            api=api,
            sweeper=sweeper,
            data=data,
            ingress=ingress,
            inference=inference,
            alarms=self.alarms,
            unclosed=unclosed,
        )

    def _topic(self) -> sns.Topic:
        key = kms.Key(
            self,
            "Key",
            description=f"Voxgate {self._environment.name}: alarms on their way to who is paged",
            enable_key_rotation=True,
            removal_policy=cdk.RemovalPolicy.DESTROY,
        )
        topic = sns.Topic(self, "Pages", display_name=f"Voxgate {self._environment.name}", master_key=key)
        topic.add_to_resource_policy(
            iam.PolicyStatement(
                sid="OverTlsAlone",
                effect=iam.Effect.DENY,
                principals=[iam.AnyPrincipal()],
                actions=["sns:Publish"],
                resources=[topic.topic_arn],
                conditions={"Bool": {"aws:SecureTransport": "false"}},
            )
        )
        # AWS's own key for SNS would not let CloudWatch in: its alarms would be lost without a word.
        ours = {"StringEquals": {"aws:SourceAccount": cdk.Stack.of(self).account}}
        alarms = iam.ServicePrincipal("cloudwatch.amazonaws.com")
        topic.add_to_resource_policy(
            iam.PolicyStatement(
                principals=[alarms], actions=["sns:Publish"], resources=[topic.topic_arn], conditions=ours
            )
        )
        key.add_to_resource_policy(
            iam.PolicyStatement(
                principals=[alarms], actions=["kms:Decrypt", "kms:GenerateDataKey"], resources=["*"], conditions=ours
            )
        )
        if self._environment.alarm_email:
            topic.add_subscription(subscriptions.EmailSubscription(self._environment.alarm_email))
        return topic

    def _customers(self, api: Api, ingress: Ingress | None) -> None:
        self._alarm(
            "ServerErrors",
            f"More than {_SERVER_ERRORS} percent of the answers are 5xx, by API Gateway's and the ingress's own count.",
            server_error_rate(api, ingress),
            threshold=_SERVER_ERRORS,
            periods=3,
            breaching=2,
        )
        self._alarm(
            "ApiSlow",
            f"One in twenty answers of the small path takes more than {_SLOW_API} seconds; at 29 they fail.",
            api.rest_api.metric_latency(statistic="p95", period=cdk.Duration.minutes(5)),
            threshold=_SLOW_API * 1000,
            periods=3,
        )
        if ingress:
            self._alarm(
                "IngressSlow",
                f"One in twenty answers of the ingress begins only after more than {_SLOW_INGRESS} seconds.",
                ingress.load_balancer.metrics.target_response_time(statistic="p95", period=cdk.Duration.minutes(5)),
                threshold=_SLOW_INGRESS,
                periods=3,
            )
        self._alarm(
            "NoProvider",
            "Requests fail because every provider of their model does.",
            reported(self._environment, "ProviderUnavailable", statistic="Sum"),
            threshold=1,
            operator=_AT_LEAST,
            periods=5,
            breaching=3,
        )

    def _ledger(self, sweeper: Sweeper) -> None:
        self._alarm(
            "LedgerDiffers",
            "The audit found a balance that is not the sum of its entries.",
            reported(self._environment, "LedgerDifference", statistic="Maximum", minutes=5),
            threshold=0,
        )
        self._alarm(
            "AuditLate",
            "The ledger's audit, due each day, has not ended for a day and a half: nobody knows whether the balances "
            "are right.",
            reported(self._environment, "LedgerDifference", statistic="SampleCount", minutes=12 * 60),
            threshold=1,
            operator=_BELOW,
            periods=3,
            missing=cloudwatch.TreatMissingData.BREACHING,
        )
        self._alarm(
            "SweeperLate",
            "The sweeper, due each minute, did not run for ten: what dead requests hold is not given back.",
            sweeper.function.metric_invocations(statistic="Sum", period=cdk.Duration.minutes(5)),
            threshold=1,
            operator=_BELOW,
            periods=2,
            missing=cloudwatch.TreatMissingData.BREACHING,  # that it does not run is what shows as no data
        )
        self._alarm(
            "SweeperFails",
            "The sweeper fails again and again: what dead requests hold is not given back.",
            sweeper.function.metric_errors(statistic="Sum", period=cdk.Duration.minutes(1)),
            threshold=1,
            operator=_AT_LEAST,
            periods=5,
            breaching=3,
        )

    def _unclosed(self, api: Api, ingress: Ingress | None) -> cloudwatch.Metric:
        """Requests that failed and could not give back what they held, of which only the log knows."""
        # A filter on text takes no dimension, so the environment is in the namespace.
        namespace = f"Voxgate/{self._environment.name}"
        for name, group in {"Api": api.log_group, **({"Ingress": ingress.log_group} if ingress else {})}.items():
            logs.MetricFilter(
                self,
                f"Unclosed{name}",
                log_group=group,
                metric_namespace=namespace,
                metric_name="Unclosed",
                filter_pattern=logs.FilterPattern.all_terms("is not closed in the ledger"),
                metric_value="1",
                default_value=0,
            )
        metric = cloudwatch.Metric(
            namespace=namespace, metric_name="Unclosed", statistic="Sum", period=cdk.Duration.minutes(5)
        )
        self._alarm(
            "LedgerUnclosed",
            "Failed requests could not give back what they held: the ledger's table refuses writes. The sweeper "
            "gives it back once it can.",
            metric,
            threshold=5,
            operator=_AT_LEAST,
            periods=3,
            breaching=2,
        )
        return metric

    def _alarm(
        self,
        name: str,
        meaning: str,
        metric: cloudwatch.IMetric,
        *,
        threshold: float,
        operator: cloudwatch.ComparisonOperator = _ABOVE,
        periods: int = 1,
        breaching: int | None = None,
        missing: cloudwatch.TreatMissingData = cloudwatch.TreatMissingData.NOT_BREACHING,
    ) -> None:
        alarm = cloudwatch.Alarm(
            self,
            name,
            alarm_name=f"voxgate-{self._environment.name}-{name}",
            alarm_description=meaning,
            metric=metric,
            threshold=threshold,
            comparison_operator=operator,
            evaluation_periods=periods,
            datapoints_to_alarm=breaching or periods,
            treat_missing_data=missing,
        )
        page = actions.SnsAction(self.topic)
        alarm.add_alarm_action(page)
        alarm.add_ok_action(page)
        self.alarms.append(alarm)


def server_error_rate(api: Api, ingress: Ingress | None) -> cloudwatch.MathExpression:
    """Percent. A few alone are no rate: at night two of ten would page."""
    five = cdk.Duration.minutes(5)
    failed: dict[str, cloudwatch.IMetric] = {
        "apiFailed": api.rest_api.metric_server_error(statistic="Sum", period=five)
    }
    asked: dict[str, cloudwatch.IMetric] = {"apiAsked": api.rest_api.metric_count(statistic="Sum", period=five)}
    if ingress:
        counts = ingress.load_balancer.metrics
        failed["ownFailed"] = counts.http_code_elb(elbv2.HttpCodeElb.ELB_5XX_COUNT, period=five)
        failed["taskFailed"] = counts.http_code_target(elbv2.HttpCodeTarget.TARGET_5XX_COUNT, period=five)
        asked["ingressAsked"] = counts.request_count(period=five)
        # The load balancer counts as a request only what it could hand to a task.
        asked["ownFailed"] = failed["ownFailed"]
    errors = " + ".join(f"FILL({name}, 0)" for name in failed)
    requests = " + ".join(f"FILL({name}, 0)" for name in asked)
    return cloudwatch.MathExpression(
        expression=f"IF(({errors}) >= 3, 100 * ({errors}) / ({requests}), 0)",
        using_metrics={**failed, **asked},
        label="5xx, percent",
        period=five,
    )
