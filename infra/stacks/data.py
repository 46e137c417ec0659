"""What outlives every release."""

from __future__ import annotations

import aws_cdk as cdk
from constructs import Construct

from infra.constructs.data import Data
from infra.environments import Environment


class DataStack(cdk.Stack):
    def __init__(self, scope: Construct, id: str, *, environment: Environment, env: cdk.Environment) -> None:  # noqa: A002
        super().__init__(scope, id, env=env, termination_protection=environment.production)
        self.data = Data(self, "Data", environment=environment)
