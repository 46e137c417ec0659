"""The ingress: only CloudFront reaches it, it may do what a gateway may, and nothing is cut off."""

from __future__ import annotations

import dataclasses

import pytest

from container_stack import Resource, empty_stack, environment, synthesized
from infra.constructs.container import SCRATCH
from infra.constructs.data import Data
from infra.constructs.ingress import Ingress
from infra.constructs.network import Network


def container() -> Resource:
    (only,) = synthesized("prod").one("ECS::TaskDefinition", "Ingress")["ContainerDefinitions"]
    assert isinstance(only, dict)
    return only


def target_group() -> Resource:
    return synthesized("prod").one("ElasticLoadBalancingV2::TargetGroup", "Ingress")


def attributes(resource: Resource, name: str) -> dict[str, str]:
    return {entry["Key"]: entry["Value"] for entry in resource[name]}


def test_only_cloudfront_reaches_the_load_balancer() -> None:
    template = synthesized("prod")
    assert template.one("ElasticLoadBalancingV2::LoadBalancer", "Ingress")["Scheme"] == "internal"
    rules = [
        rule
        for rule in template.all("EC2::SecurityGroupIngress").values()
        if "IngressFromCloudFront" in str(rule["GroupId"])
    ]
    assert [(rule["SourcePrefixListId"], rule["FromPort"], rule["ToPort"]) for rule in rules] == [
        ("pl-a3a144ca", 80, 80)  # com.amazonaws.global.cloudfront.origin-facing in eu-central-1
    ]
    assert "SecurityGroupIngress" not in template.one("EC2::SecurityGroup", "IngressFromCloudFront")


def test_only_the_load_balancer_reaches_the_tasks() -> None:
    template = synthesized("prod")
    rules = [r for r in template.all("EC2::SecurityGroupIngress").values() if "IngressTasks" in str(r["GroupId"])]
    assert len(rules) == 1
    assert "IngressFromCloudFront" in str(rules[0]["SourceSecurityGroupId"])
    assert "SecurityGroupIngress" not in template.one("EC2::SecurityGroup", "IngressTasks")


def test_a_region_whose_prefix_list_is_not_known_is_refused_rather_than_left_open() -> None:
    elsewhere = dataclasses.replace(environment("staging"), region="ap-east-1", zones=("ap-east-1a", "ap-east-1b"))
    _, stack = empty_stack(elsewhere)
    data, network = Data(stack, "Data", environment=elsewhere), Network(stack, "Network", environment=elsewhere)
    with pytest.raises(ValueError, match="ap-east-1"):
        Ingress(stack, "Ingress", environment=elsewhere, network=network, data=data, inference_url="", variables={})


def test_a_silent_stream_is_kept_for_as_long_as_the_environment_says() -> None:
    balancer = synthesized("prod").one("ElasticLoadBalancingV2::LoadBalancer", "Ingress")
    set_to = attributes(balancer, "LoadBalancerAttributes")
    sizes = environment("prod").ingress
    assert sizes is not None
    assert set_to["idle_timeout.timeout_seconds"] == str(sizes.idle_seconds)
    assert set_to["access_logs.s3.enabled"] == "true"
    assert set_to["deletion_protection.enabled"] == "true"
    assert set_to["routing.http.drop_invalid_header_fields.enabled"] == "true"


def test_a_task_that_goes_finishes_what_it_has() -> None:
    assert attributes(target_group(), "TargetGroupAttributes")["deregistration_delay.timeout_seconds"] == "600"
    assert container()["StopTimeout"] == 120
    told = {entry["Name"]: entry["Value"] for entry in container()["Environment"]}
    assert int(told["VOXGATE_DRAIN_SECONDS"]) == 110  # it ends by itself, before it is killed


def test_health_is_the_process_alone_so_that_a_failing_provider_takes_no_task_away() -> None:
    assert target_group()["HealthCheckPath"] == "/health/live"


def test_the_container_has_no_root_no_capability_and_one_place_to_write() -> None:
    only = container()
    assert only["ReadonlyRootFilesystem"] is True
    assert only["User"].split(":")[0] not in ("", "0", "root")
    assert only["LinuxParameters"]["Capabilities"] == {"Drop": ["ALL"]}
    assert not only.get("Privileged")
    assert [(mount["ContainerPath"], mount["ReadOnly"]) for mount in only["MountPoints"]] == [(SCRATCH, False)]


def test_the_gateway_is_told_where_everything_is() -> None:
    told = {entry["Name"]: entry["Value"] for entry in container()["Environment"]}
    assert told["VOXGATE_SPOOL_DIR"] == told["TMPDIR"] == SCRATCH
    assert told["VOXGATE_ENVIRONMENT"] == "prod"
    assert told["VOXGATE_EMBEDDED"] == "0"
    assert told["VOXGATE_REQUEST_TIMEOUT"] == "600"
    assert told["VOXGATE_CATALOG"] == environment("prod").catalog
    assert "DataAccounts" in str(told["VOXGATE_TABLE"])
    assert "DataStaging" in str(told["VOXGATE_STAGING_BUCKET"])
    assert "InferenceLoadBalancer" in str(told["VOXGATE_INFERENCE_URL"])


def test_the_task_is_arm64_with_room_for_uploads() -> None:
    task = synthesized("prod").one("ECS::TaskDefinition", "Ingress")
    sizes = environment("prod").ingress
    assert sizes is not None
    assert task["RuntimePlatform"]["CpuArchitecture"] == "ARM64"
    assert (task["Cpu"], task["Memory"]) == (str(sizes.cpu), str(sizes.memory))
    assert task["EphemeralStorage"]["SizeInGiB"] == sizes.scratch


def test_a_release_that_does_not_come_up_is_taken_back_and_nobody_gets_a_shell() -> None:
    service = synthesized("prod").one("ECS::Service", "Ingress")
    assert service["DeploymentConfiguration"]["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
    assert service["DeploymentConfiguration"]["MinimumHealthyPercent"] == 100
    assert service["EnableExecuteCommand"] is False
    assert service["NetworkConfiguration"]["AwsvpcConfiguration"]["AssignPublicIp"] == "DISABLED"
    assert "DesiredCount" not in service  # it would undo the scaling at each deployment


def test_the_number_of_tasks_follows_requests_and_cpu_within_the_environments_bounds() -> None:
    template = synthesized("prod")
    sizes = environment("prod").ingress
    assert sizes is not None
    bounds = template.one("ApplicationAutoScaling::ScalableTarget", "Ingress")
    assert (bounds["MinCapacity"], bounds["MaxCapacity"]) == (sizes.fewest, sizes.most)
    followed = {
        policy["TargetTrackingScalingPolicyConfiguration"]["PredefinedMetricSpecification"]["PredefinedMetricType"]
        for name, policy in template.all("ApplicationAutoScaling::ScalingPolicy").items()
        if name.startswith("Ingress")
    }
    assert followed == {"ALBRequestCountPerTarget", "ECSServiceAverageCPUUtilization"}


def test_the_task_may_do_what_a_gateway_may_and_no_more() -> None:
    template = synthesized("prod")
    own = template.actions("IngressTaskTaskRole")
    assert own - template.actions("ApiHostRole") == set()
    assert {"dynamodb:UpdateItem", "s3:PutObject", "secretsmanager:GetSecretValue", "kms:Decrypt"} <= own
    assert not [action for action in own if "*" in action]
    assert not [s for s in template.statements("IngressTaskTaskRole") if s["Resource"] == "*"]


def test_without_providers_it_may_read_no_secret() -> None:
    own = synthesized("prod", providers=False).actions("IngressTaskTaskRole")
    assert not [action for action in own if action.startswith("secretsmanager:")]


def test_logs_end() -> None:
    group = synthesized("prod").one("Logs::LogGroup", "Ingress")
    assert group["RetentionInDays"] == environment("prod").log_days
    assert "IngressLog" in str(container()["LogConfiguration"]["Options"]["awslogs-group"])
