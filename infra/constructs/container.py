"""What the two containers have in common: how they are built, locked down, and heard."""

from __future__ import annotations

from pathlib import Path

import aws_cdk as cdk
from aws_cdk import aws_ecr_assets as assets
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.constructs.rules import acknowledge
from infra.environments import Environment

PORT = 8080
# The only place where they may write. In the image it is a VOLUME that this user owns, because an empty
# volume takes owner and mode from there, and is root's otherwise.
SCRATCH = "/scratch"
_USER = "10001:10001"
_ROOT = Path(__file__).parents[2]


def image(service: str, *, platform: assets.Platform, build_args: dict[str, str] | None = None) -> ecs.ContainerImage:
    """The image of `functions/<service>/Dockerfile`, built when it is deployed: synthesis only copies and
    hashes what `.dockerignore` lets through of the repository."""
    return ecs.ContainerImage.from_asset(
        str(_ROOT),
        file=f"functions/{service}/Dockerfile",
        platform=platform,
        build_args=build_args,
        ignore_mode=cdk.IgnoreMode.DOCKER,
    )


def log_group(scope: Construct, id: str, *, environment: Environment) -> logs.LogGroup:  # noqa: A002
    group = logs.LogGroup(
        scope,
        id,
        removal_policy=cdk.RemovalPolicy.RETAIN if environment.production else cdk.RemovalPolicy.DESTROY,
    )
    resource = group.node.default_child
    assert isinstance(resource, logs.CfnLogGroup)
    resource.retention_in_days = environment.log_days  # the construct itself knows the days by name only
    return group


def add_container(
    task: ecs.TaskDefinition,
    *,
    image: ecs.ContainerImage,
    group: logs.ILogGroup,
    variables: dict[str, str],
    stop_timeout: cdk.Duration,
    gpus: int | None = None,
    memory: int | None = None,
) -> ecs.ContainerDefinition:
    """The task's one container: without root, capabilities, or a file system it may write to except
    the scratch volume, and with its log (and the metrics in it) in `group`."""
    task.add_volume(name="scratch")
    kernel = ecs.LinuxParameters(task, "Kernel", init_process_enabled=True)
    kernel.drop_capabilities(ecs.Capability.ALL)
    container = task.add_container(
        "main",
        image=image,
        user=_USER,
        readonly_root_filesystem=True,
        linux_parameters=kernel,
        gpu_count=gpus,
        memory_reservation_mib=memory,
        environment={"VOXGATE_SPOOL_DIR": SCRATCH, "TMPDIR": SCRATCH, **variables},
        logging=ecs.LogDrivers.aws_logs(
            stream_prefix="main",
            log_group=group,
            # A log that stalls must not stall the audio; what does not fit is lost.
            mode=ecs.AwsLogDriverMode.NON_BLOCKING,
            max_buffer_size=cdk.Size.mebibytes(25),
        ),
        port_mappings=[ecs.PortMapping(container_port=PORT)],
        stop_timeout=stop_timeout,
    )
    container.add_mount_points(ecs.MountPoint(source_volume="scratch", container_path=SCRATCH, read_only=False))
    acknowledge(
        task,
        "ECS2",
        "The variables are names and sizes; a provider's key is read from Secrets Manager when it is used.",
    )
    acknowledge(
        task.obtain_execution_role(),
        "IAM5",
        "ecr:GetAuthorizationToken knows no resource; pulling the image and logging name theirs.",
        "Resource::*",
    )
    return container


def add_targets(
    balancer: elbv2.ApplicationLoadBalancer,
    service: elbv2.IApplicationLoadBalancerTarget,
    *,
    health: str,
    failures: int,
    drain: cdk.Duration,
) -> elbv2.ApplicationTargetGroup:
    """The service's tasks behind the balancer, each next request to the one with the fewest. A task that fails
    at the path `health` so often in a row is replaced; one that is taken away has `drain` to finish."""
    listener = balancer.add_listener("Http", port=80, protocol=elbv2.ApplicationProtocol.HTTP, open=False)
    return listener.add_targets(
        "Tasks",
        port=PORT,
        protocol=elbv2.ApplicationProtocol.HTTP,
        targets=[service],
        load_balancing_algorithm_type=elbv2.TargetGroupLoadBalancingAlgorithmType.LEAST_OUTSTANDING_REQUESTS,
        deregistration_delay=drain,
        health_check=elbv2.HealthCheck(
            path=health,
            healthy_http_codes="200",
            interval=cdk.Duration.seconds(10),
            timeout=cdk.Duration.seconds(5),
            healthy_threshold_count=2,
            unhealthy_threshold_count=failures,
        ),
    )
