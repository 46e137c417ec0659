"""A Lambda function out of `functions/`, as all of them are: role, logs, tracing, and the alias `live`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import jsii
from aws_cdk import (
    Acknowledgment,
    Annotations,
    AssetHashType,
    BundlingOptions,
    DockerImage,
    Duration,
    ILocalBundling,
    RemovalPolicy,
    Validations,
)
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from constructs import Construct

from infra.constructs.container import log_group
from infra.constructs.network import Network
from infra.constructs.rules import acknowledge
from infra.environments import Environment

_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "layers" / "dependencies"
_PLATFORM = tomllib.loads((_BUILD / "platform.toml").read_text(encoding="utf-8"))
RUNTIME: lambda_.Runtime = getattr(lambda_.Runtime, f"PYTHON_{_PLATFORM['python'].replace('.', '_')}")
_MACHINES = {"aarch64": lambda_.Architecture.ARM_64, "x86_64": lambda_.Architecture.X86_64}
ARCHITECTURE = _MACHINES[_PLATFORM["architecture"]]


class Dependencies(Construct):
    """The layer of third-party packages for Lambda's platform."""

    def __init__(self, scope: Construct, id: str) -> None:  # noqa: A002
        super().__init__(scope, id)
        self.layer = lambda_.LayerVersion(
            self,
            "Layer",
            description="Third-party packages of Voxgate, with compiled bytecode",
            compatible_architectures=[ARCHITECTURE],
            compatible_runtimes=[RUNTIME],
            code=lambda_.Code.from_asset(str(_BUILD), **_built(self, "layer")),
        )


class _Bundling(TypedDict):
    bundling: BundlingOptions
    asset_hash_type: AssetHashType


def _built(scope: Construct, what: str) -> _Bundling:
    """By `build.py`, here and without Docker. The hash is that of what comes out: the same packages and
    code without bytecode are something else to deploy."""
    build = _Build(scope, what)
    image = DockerImage.from_registry("scratch")  # has to be named, and is never used
    return {"bundling": BundlingOptions(image=image, local=build), "asset_hash_type": AssetHashType.OUTPUT}


@jsii.implements(ILocalBundling)
class _Build:
    def __init__(self, scope: Construct, what: str) -> None:
        self._scope = scope
        self._what = what

    def try_bundle(self, output_dir: str, *, image: DockerImage, **options: Any) -> bool:
        command = [sys.executable, str(_BUILD / "build.py"), self._what, output_dir]
        done = subprocess.run(  # noqa: S603 - our own script
            command, check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            # A machine without Lambda's Python can still say what would be deployed; `cdk deploy --strict`,
            # which the pipeline uses, takes the warning for an error.
            Annotations.of(self._scope).add_warning_v2("voxgate:noBytecode", done.stderr.strip())
            subprocess.run(  # noqa: S603
                [*command, "--without-bytecode"], check=True, stdout=subprocess.DEVNULL
            )
        return True


class Function(Construct):
    """`alias` is what others call, never the function itself: a version's snapshot starts in a tenth of the
    time, and a release can be taken back."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        environment: Environment,
        layer: lambda_.ILayerVersion,
        handler: str,
        description: str,
        memory: int,
        timeout_seconds: int,
        variables: Mapping[str, str],
        reserved_concurrency: int | None = None,
        network: Network | None = None,
    ) -> None:
        super().__init__(scope, id)
        self.log_group = log_group(self, "Log", environment=environment)
        self.role = self._role(in_network=network is not None)
        self.function = lambda_.Function(
            self,
            "Function",
            description=description,
            runtime=RUNTIME,
            architecture=ARCHITECTURE,
            code=lambda_.Code.from_asset(
                str(_ROOT / "functions"),
                # What runs in containers, and what running it here leaves behind.
                exclude=["ingress", "inference", "**/__pycache__"],
                **_built(self, "functions"),
            ),
            handler=handler,
            layers=[layer],
            memory_size=memory,
            timeout=Duration.seconds(timeout_seconds),
            environment=dict(variables),
            reserved_concurrent_executions=reserved_concurrency,
            role=self.role,
            log_group=self.log_group,
            tracing=lambda_.Tracing.ACTIVE,
            snap_start=lambda_.SnapStartConf.ON_PUBLISHED_VERSIONS,
            # An old version's snapshot is paid for as long as it exists.
            current_version_options=lambda_.VersionOptions(removal_policy=RemovalPolicy.DESTROY),
            vpc=network.vpc if network else None,
            vpc_subnets=network.workloads if network else None,
            allow_all_outbound=False if network else None,
        )
        if network:
            # AWS and the providers, all of them over TLS; what else it reaches allows it by itself.
            self.function.connections.allow_to_any_ipv4(ec2.Port.tcp(443))
        Validations.of(self.function).acknowledge(
            Acknowledgment(
                id="Construct-Annotations::@aws-cdk/aws-lambda:snapStartRequirePublish",
                reason="Said of every function with SnapStart; this one is called by the alias of a published version.",
            )
        )
        acknowledge(
            self.function,
            "L1",
            "The runtime is the newest of Lambda's on which this project's tests run the function out of its asset; "
            "layers/dependencies/platform.toml names it, and moves on with them.",
        )
        self.alias = lambda_.Alias(self, "Live", alias_name="live", version=self.function.current_version)

    def _role(self, *, in_network: bool) -> iam.Role:
        """Without AWS's managed policies, which let a function write to every log of the account."""
        role = iam.Role(self, "Role", assumed_by=iam.ServicePrincipal("lambda.amazonaws.com"))
        role.add_to_policy(
            iam.PolicyStatement(
                actions=["logs:CreateLogStream", "logs:PutLogEvents"], resources=[self.log_group.log_group_arn]
            )
        )
        reason = "X-Ray knows no resources to which PutTraceSegments and PutTelemetryRecords could be limited."
        if in_network:
            role.add_to_policy(
                iam.PolicyStatement(
                    actions=[
                        "ec2:CreateNetworkInterface",
                        "ec2:DeleteNetworkInterface",
                        "ec2:DescribeNetworkInterfaces",
                        "ec2:DescribeSubnets",
                    ],
                    resources=["*"],
                )
            )
            reason += (
                " Lambda makes the network interfaces of a function in a VPC with its role, asks for these rights "
                "without a resource when the function is created, and Describe knows none."
            )
        acknowledge(role, "IAM5", reason, "Resource::*")
        return role
