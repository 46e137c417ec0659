"""Gives back what died with its process, once a minute, and audits the ledger, once a day: the Lambda function
`sweep`."""

from __future__ import annotations

from aws_cdk import Duration
from aws_cdk import aws_events as events
from aws_cdk import aws_events_targets as targets
from aws_cdk import aws_lambda as lambda_
from constructs import Construct

from infra.constructs.data import Data
from infra.constructs.function import Function
from infra.environments import Environment


class Sweeper(Construct):
    """That it is late shows in the function's invocations and errors, what the audit finds in `LedgerDifference`."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        environment: Environment,
        data: Data,
        layer: lambda_.ILayerVersion,
    ) -> None:
        super().__init__(scope, id)
        host = Function(
            self,
            "Host",
            environment=environment,
            layer=layer,
            handler="sweep.handler.handler",
            description="Gives back holds and places whose process died, and audits the ledger",
            memory=512,
            timeout_seconds=55,  # done before the next one starts
            variables={"VOXGATE_ENVIRONMENT": environment.name, "VOXGATE_TABLE": data.table.table_name},
        )
        data.allow_sweeper(host.role)
        self.function, self.alias, self.log_group = host.function, host.alias, host.log_group
        self.schedule = events.Rule(
            self,
            "Schedule",
            description="Once a minute",
            schedule=events.Schedule.rate(Duration.minutes(1)),
            # What one run missed the next one does.
            targets=[targets.LambdaFunction(self.alias, retry_attempts=0, max_event_age=Duration.minutes(1))],
        )
        self.audit = events.Rule(
            self,
            "Audit",
            description="Once a day: every balance against its entries",
            schedule=events.Schedule.cron(minute="17", hour="3"),  # UTC
            targets=[
                targets.LambdaFunction(
                    self.alias,
                    event=events.RuleTargetInput.from_object({"task": "audit"}),
                    # Reading changes nothing, so once more is safe; a day without it would pass unseen.
                    retry_attempts=2,
                    max_event_age=Duration.hours(1),
                )
            ],
        )
