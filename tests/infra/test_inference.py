"""The inference service: one task for each GPU, as many as the queue asks for, and none where none is wanted."""

from __future__ import annotations

import dataclasses

import pytest

from container_stack import Resource, empty_stack, environment, synthesized
from infra.constructs.data import Data
from infra.constructs.inference import Inference
from infra.constructs.metrics import NAMESPACE
from infra.constructs.network import Network
from infra.environments import Inference as Sizes


def container() -> Resource:
    (only,) = synthesized("prod").one("ECS::TaskDefinition", "Inference")["ContainerDefinitions"]
    assert isinstance(only, dict)
    return only


def machine() -> Resource:
    data = synthesized("prod").one("EC2::LaunchTemplate", "Inference")["LaunchTemplateData"]
    assert isinstance(data, dict)
    return data


def sizes(name: str) -> Sizes:
    found = environment(name).inference
    assert found is not None
    return found


def test_one_task_has_one_gpu_and_the_model_that_is_in_its_image() -> None:
    only = container()
    assert only["ResourceRequirements"] == [{"Type": "GPU", "Value": "1"}]
    told = {entry["Name"]: entry["Value"] for entry in only["Environment"]}
    assert told["VOXGATE_WHISPER_MODEL"] == sizes("prod").model
    assert told["VOXGATE_WHISPER_DEVICE"] == "cuda"


def test_the_container_has_no_root_no_capability_and_one_place_to_write() -> None:
    only = container()
    assert only["ReadonlyRootFilesystem"] is True
    assert only["User"].split(":")[0] not in ("", "0", "root")
    assert only["LinuxParameters"]["Capabilities"] == {"Drop": ["ALL"]}
    assert [mount["ContainerPath"] for mount in only["MountPoints"]] == ["/scratch"]


def test_the_machines_are_the_environments_with_encrypted_disks_and_guarded_credentials() -> None:
    data = machine()
    assert data["InstanceType"] == sizes("prod").instance_type
    assert data["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    assert all(device["Ebs"]["Encrypted"] for device in data["BlockDeviceMappings"])
    assert "ECS_AWSVPC_BLOCK_IMDS=true" in str(data["UserData"])
    assert "amazonlinux2023gpu" in str(data["ImageId"])  # a parameter of SSM, whose name CDK makes of the path


def test_the_task_reads_staged_audio_and_nothing_else() -> None:
    template = synthesized("prod")
    assert template.actions("InferenceTaskTaskRole") == {"s3:GetObject", "kms:Decrypt"}
    (read,) = [s for s in template.statements("InferenceTaskTaskRole") if s["Action"] == "s3:GetObject"]
    assert read["Resource"]["Fn::Join"][1][1] == "/staging/*"


def test_the_machines_role_names_each_action_and_its_cluster() -> None:
    template = synthesized("prod")
    assert not [action for action in template.actions("InferenceInstanceRole") if "*" in action]
    spread = [s["Action"] for s in template.statements("InferenceInstanceRole") if s["Resource"] == "*"]
    assert spread == ["ecs:DiscoverPollEndpoint"]


def test_only_the_gateway_reaches_it() -> None:
    template = synthesized("prod")
    assert template.one("ElasticLoadBalancingV2::LoadBalancer", "Inference")["Scheme"] == "internal"
    rules = template.all("EC2::SecurityGroupIngress").values()
    callers = [str(rule["SourceSecurityGroupId"]) for rule in rules if "InferenceFromGateway" in str(rule["GroupId"])]
    assert len(callers) == 1
    assert "IngressTasks" in callers[0]
    assert "SecurityGroupIngress" not in template.one("EC2::SecurityGroup", "InferenceFromGateway")


def test_a_task_is_given_work_once_its_model_is_loaded_and_finishes_it_before_it_goes() -> None:
    template = synthesized("prod")
    group = template.one("ElasticLoadBalancingV2::TargetGroup", "Inference")
    set_to = {entry["Key"]: entry["Value"] for entry in group["TargetGroupAttributes"]}
    assert group["HealthCheckPath"] == "/health/ready"
    assert set_to["load_balancing.algorithm.type"] == "least_outstanding_requests"
    assert set_to["deregistration_delay.timeout_seconds"] == "600"
    assert container()["StopTimeout"] == 600
    told = {entry["Name"]: entry["Value"] for entry in container()["Environment"]}
    assert int(told["VOXGATE_DRAIN_SECONDS"]) == 590  # it ends by itself, before it is killed
    assert template.one("ECS::Service", "Inference")["HealthCheckGracePeriodSeconds"] >= 300


@pytest.mark.parametrize("name", ["staging", "prod"])
def test_the_number_of_tasks_follows_the_queue_within_the_environments_bounds(name: str) -> None:
    template = synthesized(name)
    bounds = template.one("ApplicationAutoScaling::ScalableTarget", "Inference")
    assert (bounds["MinCapacity"], bounds["MaxCapacity"]) == (sizes(name).fewest, sizes(name).most)
    policy = template.one("ApplicationAutoScaling::ScalingPolicy", "InferenceServiceTaskCountTargetQueue")
    tracked = policy["TargetTrackingScalingPolicyConfiguration"]
    assert tracked["TargetValue"] == sizes(name).queued_seconds
    assert tracked["CustomizedMetricSpecification"] == {
        "Namespace": NAMESPACE,
        "MetricName": "QueuedAudioSeconds",
        "Dimensions": [{"Name": "environment", "Value": name}],
        "Statistic": "Average",
    }


def test_from_none_the_first_request_that_finds_nobody_starts_one() -> None:
    template = synthesized("staging")
    assert sizes("staging").fewest == 0
    alarm = template.one("CloudWatch::Alarm", "InferenceService")
    assert (alarm["MetricName"], alarm["Statistic"]) == ("HTTPCode_ELB_503_Count", "Sum")
    assert (alarm["Threshold"], alarm["ComparisonOperator"]) == (1, "GreaterThanOrEqualToThreshold")
    assert "First" in str(alarm["AlarmActions"])
    first = template.one("ApplicationAutoScaling::ScalingPolicy", "InferenceServiceTaskCountTargetFirst")
    steps = first["StepScalingPolicyConfiguration"]
    assert steps["AdjustmentType"] == "ChangeInCapacity"
    assert [step["ScalingAdjustment"] for step in steps["StepAdjustments"]] == [1]
    assert steps["Cooldown"] >= 300  # or each minute of the first one's start would ask for another


def test_where_some_are_kept_warm_nothing_starts_more_of_them_for_a_503() -> None:
    policies = synthesized("prod").all("ApplicationAutoScaling::ScalingPolicy")
    assert not [name for name in policies if name.startswith("InferenceServiceTaskCountTargetFirst")]


@pytest.mark.parametrize("name", ["staging", "prod"])
def test_machines_come_and_go_with_the_tasks_down_to_none_and_never_under_one(name: str) -> None:
    template = synthesized(name)
    group = template.one("AutoScaling::AutoScalingGroup", "Inference")
    assert (group["MinSize"], group["MaxSize"]) == ("0", str(sizes(name).most + 1))
    assert group["NewInstancesProtectedFromScaleIn"] is True
    provider = template.one("ECS::CapacityProvider", "Inference")["AutoScalingGroupProvider"]
    assert provider["ManagedScaling"]["Status"] == "ENABLED"
    # The two belong together: machines that are protected without ECS to take it off would never go.
    assert provider["ManagedTerminationProtection"] == "ENABLED"
    service = template.one("ECS::Service", "Inference")
    assert "LaunchType" not in service
    assert len(service["CapacityProviderStrategy"]) == 1
    assert service["DeploymentConfiguration"]["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
    assert service["EnableExecuteCommand"] is False
    assert "DesiredCount" not in service


def test_a_machine_that_its_image_does_not_run_on_is_refused() -> None:
    arm = dataclasses.replace(environment("prod"), inference=Sizes(instance_type="g5g.xlarge"))
    _, stack = empty_stack(arm)
    data, network = Data(stack, "Data", environment=arm), Network(stack, "Network", environment=arm)
    with pytest.raises(ValueError, match=r"g5g\.xlarge"):
        Inference(stack, "Inference", environment=arm, network=network, data=data)
