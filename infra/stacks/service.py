"""Everything that runs, and what watches it."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_cloudwatch_actions as actions
from constructs import Construct

from infra.constructs.api import Api
from infra.constructs.data import Data
from infra.constructs.edge import Edge
from infra.constructs.function import Dependencies
from infra.constructs.inference import Inference
from infra.constructs.ingress import Ingress
from infra.constructs.network import Network
from infra.constructs.observability import Observability
from infra.constructs.sweeper import Sweeper
from infra.environments import Environment
from infra.stacks.front import FrontStack


class ServiceStack(cdk.Stack):
    """`network`, `ingress` and `inference` are None where the environment has none."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        environment: Environment,
        env: cdk.Environment,
        data: Data,
        front: FrontStack,
    ) -> None:
        super().__init__(scope, id, env=env, termination_protection=environment.production)
        layer = Dependencies(self, "Dependencies").layer
        wanted = environment.ingress or environment.inference
        self.network = Network(self, "Network", environment=environment) if wanted else None
        self.inference = (
            Inference(self, "Inference", environment=environment, network=self.network, data=data)
            if self.network and environment.inference
            else None
        )
        inference_url = self.inference.url if self.inference else ""
        variables = {
            **data.variables,
            "VOXGATE_CATALOG": environment.catalog,
            "VOXGATE_INFERENCE_URL": inference_url,
        }
        self.api = Api(
            self,
            "Api",
            environment=environment,
            data=data,
            variables=variables,
            layer=layer,
            network=self.network if self.inference else None,
        )
        self.ingress = (
            Ingress(
                self,
                "Ingress",
                environment=environment,
                network=self.network,
                data=data,
                inference_url=inference_url,
                variables=variables,
            )
            if self.network and environment.ingress
            else None
        )
        if self.inference:
            self.inference.allow_from(self.api.function)
            if self.ingress:
                self.inference.allow_from(self.ingress.service)
        self.sweeper = Sweeper(self, "Sweeper", environment=environment, data=data, layer=layer)
        self.observability = Observability(
            self,
            "Observability",
            environment=environment,
            api=self.api,
            sweeper=self.sweeper,
            data=data,
            ingress=self.ingress,
            inference=self.inference,
        )
        for alarm in self.api.alarms:
            alarm.add_alarm_action(actions.SnsAction(self.observability.topic))
        self.edge = Edge(
            self,
            "Edge",
            environment=environment,
            data=data,
            api=self.api,
            ingress=self.ingress,
            certificate=front.certificate,
            web_acl=front.firewall.web_acl.attr_arn,
        )
