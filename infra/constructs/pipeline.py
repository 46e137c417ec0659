"""The roles that GitHub's workflows take on by OIDC, so that no key of AWS is stored with GitHub."""

from __future__ import annotations

from collections.abc import Sequence

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra import environments as environments_
from infra.constructs.rules import acknowledge
from infra.environments import Environment

_ISSUER = "token.actions.githubusercontent.com"
_FRONT = "us-east-1"
_STACKS = ("Data", "Front", "Service")


class Pipeline(Construct):
    """`deploy` are the roles by environment: each is for jobs of the GitHub environment of that name alone, whose rules
    (branches, approval) stand before it, and may take on the roles of CDK's bootstrap, nothing else. `diff` is for
    pull requests: it reads the templates of the stacks that are deployed."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        pipeline: environments_.Pipeline,
        environments: Sequence[Environment],
    ) -> None:
        super().__init__(scope, id)
        self._repository = pipeline.repository
        self._provider = self._identity_provider(make=pipeline.provider)
        self.deploy = {environment.name: self._deploy(environment) for environment in environments}
        self.diff = self._diff(environments)

    def _identity_provider(self, *, make: bool) -> str:
        """An ARN."""
        if make:
            return iam.OidcProviderNative(
                self, "GitHub", url=f"https://{_ISSUER}", client_ids=["sts.amazonaws.com"]
            ).oidc_provider_arn
        return cdk.Stack.of(self).format_arn(service="iam", region="", resource="oidc-provider", resource_name=_ISSUER)

    def _role(self, id: str, name: str, *, subject: str, description: str, hours: int) -> iam.Role:  # noqa: A002
        said = {f"{_ISSUER}:aud": "sts.amazonaws.com", f"{_ISSUER}:sub": f"repo:{self._repository}:{subject}"}
        return iam.Role(
            self,
            id,
            role_name=name,  # the workflow names it
            description=description,
            assumed_by=iam.WebIdentityPrincipal(self._provider, {"StringEquals": said}),
            max_session_duration=cdk.Duration.hours(hours),
        )

    def _deploy(self, environment: Environment) -> iam.Role:
        role = self._role(
            f"Deploy{environment.name.capitalize()}",
            f"voxgate-deploy-{environment.name}",
            subject=f"environment:{environment.name}",
            description=f"GitHub deploys Voxgate's environment {environment.name}",
            hours=2,  # the images are built with it
        )
        kinds = ["deploy", "file-publishing", "lookup"]
        if environment.ingress or environment.inference:
            kinds.append("image-publishing")
        bootstrapped = [(environment.region, kind) for kind in kinds]
        bootstrapped += [(_FRONT, kind) for kind in kinds if kind != "image-publishing"]
        role.add_to_policy(
            iam.PolicyStatement(
                actions=["sts:AssumeRole"],
                resources=[self._bootstrapped(*one) for one in dict.fromkeys(bootstrapped)],
            )
        )
        return role

    def _bootstrapped(self, region: str, kind: str) -> str:
        """The ARN of a role that `cdk bootstrap` makes."""
        stack = cdk.Stack.of(self)
        qualifier = cdk.DefaultStackSynthesizer.DEFAULT_QUALIFIER
        name = f"cdk-{qualifier}-{kind}-role-{stack.account}-{region}"
        return stack.format_arn(service="iam", region="", resource="role", resource_name=name)

    def _diff(self, environments: Sequence[Environment]) -> iam.Role:
        """Not CDK's own role for looking things up, which may read nearly everything in the account."""
        role = self._role(
            "Diff",
            "voxgate-diff",
            subject="pull_request",
            description="GitHub compares a pull request with what is deployed of Voxgate",
            hours=1,
        )
        stacks = [
            (environment.region if stack != "Front" else _FRONT, f"Voxgate-{environment.name}-{stack}/*")
            for environment in environments
            for stack in _STACKS
        ]
        role.add_to_policy(
            iam.PolicyStatement(
                actions=["cloudformation:DescribeStacks", "cloudformation:GetTemplate"],
                resources=[
                    cdk.Stack.of(self).format_arn(
                        service="cloudformation", region=region, resource="stack", resource_name=name
                    )
                    for region, name in stacks
                ],
            )
        )
        account = cdk.Stack.of(self).account
        shown = "<AWS::AccountId>" if cdk.Token.is_unresolved(account) else account
        acknowledge(
            role,
            "IAM5",
            "Each stack is named; what follows its name is the id that CloudFormation makes up.",
            *(f"Resource::arn:aws:cloudformation:{region}:{shown}:stack/{name}" for region, name in stacks),
        )
        return role
