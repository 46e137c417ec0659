"""The streaming path: an internal load balancer that only CloudFront reaches, and Fargate tasks behind it."""

from __future__ import annotations

from collections.abc import Mapping

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecr_assets as assets
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from constructs import Construct

from infra.constructs import container
from infra.constructs.data import Data
from infra.constructs.network import Network
from infra.environments import Environment
from infra.environments import Ingress as Sizes

# com.amazonaws.global.cloudfront.origin-facing, by region: the identifiers never change, and to look
# them up would take credentials at synthesis. Find another region's with
#   aws ec2 describe-managed-prefix-lists --filters
#     Name=prefix-list-name,Values=com.amazonaws.global.cloudfront.origin-facing
# CloudFront's own group, CloudFront-VPCOrigins-Service-SG, is narrower, but exists only after the first
# VPC origin does. No other customer's distribution reaches this load balancer: it has no public address.
_CLOUDFRONT = {
    "ap-northeast-1": "pl-58a04531",
    "ap-northeast-2": "pl-22a6434b",
    "ap-northeast-3": "pl-31a14458",
    "ap-south-1": "pl-9aa247f3",
    "ap-southeast-1": "pl-31a34658",
    "ap-southeast-2": "pl-b8a742d1",
    "ca-central-1": "pl-38a64351",
    "eu-central-1": "pl-a3a144ca",
    "eu-north-1": "pl-fab65393",
    "eu-west-1": "pl-4fa04526",
    "eu-west-2": "pl-93a247fa",
    "eu-west-3": "pl-75b1541c",
    "sa-east-1": "pl-5da64334",
    "us-east-1": "pl-3b927c52",
    "us-east-2": "pl-b6a144df",
    "us-west-1": "pl-4ea04527",
    "us-west-2": "pl-82a045eb",
}
# A request may take this long in all (VOXGATE_REQUEST_TIMEOUT): so long a task that is to go keeps those
# it has, before it is even told.
_DRAIN = cdk.Duration.seconds(600)
_STOP = 120  # seconds from being told to being killed: the most that Fargate gives
_BUSY_CPU = 60  # percent, at which another task is started


class Ingress(Construct):
    """`log_group` has the gateway's log lines and metrics."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        environment: Environment,
        network: Network,
        data: Data,
        inference_url: str,
        variables: Mapping[str, str],
    ) -> None:
        super().__init__(scope, id)
        sizes = environment.ingress
        if sizes is None:
            raise ValueError(f"The environment '{environment.name}' has no ingress.")
        self.log_group = container.log_group(self, "Log", environment=environment)
        self.load_balancer = self._load_balancer(environment, sizes, network)
        task = self._task(
            sizes,
            {
                "VOXGATE_ENVIRONMENT": environment.name,
                **data.variables,
                "VOXGATE_CATALOG": environment.catalog,
                "VOXGATE_INFERENCE_URL": inference_url,
                "VOXGATE_EMBEDDED": "0",  # no recognizer in this image
                "VOXGATE_DRAIN_SECONDS": str(_STOP - 10),
                **variables,
            },
        )
        self.task_role = task.task_role
        data.allow_gateway(self.task_role)
        self.service = self._service(task, network)
        self._balance_and_scale(sizes)

    def _load_balancer(self, environment: Environment, sizes: Sizes, network: Network) -> elbv2.ApplicationLoadBalancer:
        if environment.region not in _CLOUDFRONT:
            raise ValueError(f"CloudFront's prefix list in {environment.region} is not known: add it to ingress.py.")
        group = ec2.SecurityGroup(
            self,
            "FromCloudFront",
            vpc=network.vpc,
            allow_all_outbound=False,
            description="Voxgate: load balancer of the ingress, for the VPC origin of CloudFront alone",
        )
        group.add_ingress_rule(ec2.Peer.prefix_list(_CLOUDFRONT[environment.region]), ec2.Port.tcp(80))
        balancer = elbv2.ApplicationLoadBalancer(
            self,
            "LoadBalancer",
            vpc=network.vpc,
            vpc_subnets=network.workloads,
            internet_facing=False,
            security_group=group,
            # A stream, and a client that waits for its transcript, are silent for long.
            idle_timeout=cdk.Duration.seconds(sizes.idle_seconds),
            drop_invalid_header_fields=True,
            deletion_protection=environment.production,
        )
        balancer.log_access_logs(network.logs, "ingress")
        return balancer

    def _task(self, sizes: Sizes, variables: dict[str, str]) -> ecs.FargateTaskDefinition:
        task = ecs.FargateTaskDefinition(
            self,
            "Task",
            cpu=sizes.cpu,
            memory_limit_mib=sizes.memory,
            ephemeral_storage_gib=sizes.scratch,
            runtime_platform=ecs.RuntimePlatform(
                cpu_architecture=ecs.CpuArchitecture.ARM64, operating_system_family=ecs.OperatingSystemFamily.LINUX
            ),
        )
        container.add_container(
            task,
            image=container.image("ingress", platform=assets.Platform.LINUX_ARM64),
            group=self.log_group,
            variables=variables,
            stop_timeout=cdk.Duration.seconds(_STOP),
        )
        return task

    def _service(self, task: ecs.FargateTaskDefinition, network: Network) -> ecs.FargateService:
        cluster = ecs.Cluster(self, "Cluster", vpc=network.vpc, container_insights_v2=ecs.ContainerInsights.ENHANCED)
        group = ec2.SecurityGroup(
            self, "Tasks", vpc=network.vpc, allow_all_outbound=False, description="Voxgate: tasks of the ingress"
        )
        # AWS and the providers, all of them over TLS. What reaches the inference service is allowed there.
        group.add_egress_rule(ec2.Peer.any_ipv4(), ec2.Port.tcp(443))
        return ecs.FargateService(
            self,
            "Service",
            cluster=cluster,
            task_definition=task,
            vpc_subnets=network.workloads,
            security_groups=[group],
            assign_public_ip=False,
            # How many there are is the scaling's to say: a number here would be set again at each deployment.
            min_healthy_percent=100,
            max_healthy_percent=200,
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            health_check_grace_period=cdk.Duration.seconds(60),
            enable_execute_command=False,
            propagate_tags=ecs.PropagatedTagSource.SERVICE,
        )

    def _balance_and_scale(self, sizes: Sizes) -> None:
        # Uploads and streams are of very different lengths: the next belongs to who has the fewest.
        targets = container.add_targets(
            self.load_balancer, self.service, health="/health/live", failures=3, drain=_DRAIN
        )
        scaling = self.service.auto_scale_task_count(min_capacity=sizes.fewest, max_capacity=sizes.most)
        scaling.scale_on_request_count(
            "Requests",
            requests_per_target=sizes.requests_per_task,
            target_group=targets,
            scale_in_cooldown=cdk.Duration.minutes(5),
            scale_out_cooldown=cdk.Duration.minutes(1),
        )
        scaling.scale_on_cpu_utilization(
            "Cpu",
            target_utilization_percent=_BUSY_CPU,
            scale_in_cooldown=cdk.Duration.minutes(5),
            scale_out_cooldown=cdk.Duration.minutes(1),
        )
