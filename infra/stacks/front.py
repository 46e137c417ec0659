"""What CloudFront wants in us-east-1."""

from __future__ import annotations

import aws_cdk as cdk
from constructs import Construct

from infra.constructs.certificate import Certificate
from infra.constructs.firewall import Firewall
from infra.environments import Environment


class FrontStack(cdk.Stack):
    """`certificate` is None where there is no domain."""

    def __init__(self, scope: Construct, id: str, *, environment: Environment, env: cdk.Environment) -> None:  # noqa: A002
        super().__init__(
            scope,
            id,
            env=env,
            termination_protection=environment.production,
        )
        self.firewall = Firewall(self, "Firewall", environment=environment)
        self.certificate = (
            Certificate(self, "Certificate", domain=environment.domain).certificate if environment.domain else None
        )
        # Read from another region by `Fn::GetStackOutput`: the strong kind would need a function with a role of
        # its own on either side.
        for read in (self.firewall.web_acl, self.certificate):
            if read is not None:
                cdk.CrossStackReferences.of(read).produce(cdk.ReferenceStrength.WEAK)
