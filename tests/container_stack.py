"""Everything around the containers in one stack, synthesized once for each environment that a test asks for."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_lambda as lambda_

import infra  # noqa: F401 - names Node before aws_cdk asks for it
from infra.constructs.api import Api
from infra.constructs.data import Data
from infra.constructs.inference import Inference
from infra.constructs.ingress import Ingress
from infra.constructs.network import Network
from infra.constructs.observability import Observability
from infra.constructs.sweeper import Sweeper
from infra.environments import Environment, named

_ROOT = Path(__file__).parents[1]
Resource = dict[str, Any]


class Synthesized:
    """A template, with its resources by type."""

    def __init__(self, template: dict[str, Any]) -> None:
        self.resources: dict[str, Resource] = template["Resources"]

    def all(self, kind: str) -> dict[str, Resource]:
        """The properties of each resource of the type `AWS::kind`, by its logical id."""
        return {
            name: resource.get("Properties", {})
            for name, resource in self.resources.items()
            if resource["Type"] == f"AWS::{kind}"
        }

    def one(self, kind: str, start: str = "") -> Resource:
        found = [properties for name, properties in self.all(kind).items() if name.startswith(start)]
        assert len(found) == 1, f"{len(found)} of {kind} begin with '{start}'"
        return found[0]

    def statements(self, policy: str) -> list[Resource]:
        """Of the role's policy whose logical id begins so."""
        found: list[Resource] = self.one("IAM::Policy", policy)["PolicyDocument"]["Statement"]
        return found

    def actions(self, policy: str) -> set[str]:
        listed = [statement["Action"] for statement in self.statements(policy)]
        return {action for one in listed for action in ([one] if isinstance(one, str) else one)}


def environment(name: str, *, providers: bool = True) -> Environment:
    chosen = dataclasses.replace(named(name), account="111111111111")
    return chosen if providers else dataclasses.replace(chosen, provider_secrets=())


@functools.cache
def synthesized(name: str, *, providers: bool = True) -> Synthesized:
    """Without `providers`, the environment knows no upstream provider."""
    chosen = environment(name, providers=providers)
    app, stack = empty_stack(chosen)
    _fill(stack, chosen)
    template: dict[str, Any] = app.synth().get_stack_by_name("All").template
    return Synthesized(template)


def empty_stack(chosen: Environment) -> tuple[cdk.App, cdk.Stack]:
    context = json.loads((_ROOT / "infra" / "cdk.json").read_text(encoding="utf-8"))["context"]
    app = cdk.App(context={**context, "aws:cdk:bundling-stacks": []}, analytics_reporting=False)
    return app, cdk.Stack(app, "All", env=cdk.Environment(account=chosen.account, region=chosen.region))


def _fill(stack: cdk.Stack, chosen: Environment) -> None:
    layer = lambda_.LayerVersion(stack, "Layer", code=lambda_.Code.from_asset(str(_ROOT / "events")))
    data = Data(stack, "Data", environment=chosen)
    api = Api(stack, "Api", environment=chosen, data=data, variables={}, layer=layer)
    sweeper = Sweeper(stack, "Sweeper", environment=chosen, data=data, layer=layer)
    inference = ingress = None
    if chosen.ingress or chosen.inference:
        network = Network(stack, "Network", environment=chosen)
        if chosen.inference:
            inference = Inference(stack, "Inference", environment=chosen, network=network, data=data)
        if chosen.ingress:
            ingress = Ingress(
                stack,
                "Ingress",
                environment=chosen,
                network=network,
                data=data,
                inference_url=inference.url if inference else "",
                variables={"VOXGATE_REQUEST_TIMEOUT": "600"},
            )
            if inference:
                inference.allow_from(ingress.service)
    Observability(
        stack,
        "Observability",
        environment=chosen,
        api=api,
        sweeper=sweeper,
        data=data,
        ingress=ingress,
        inference=inference,
    )
