"""The containers' network: nothing in it is reachable from outside, and it costs what it must."""

from __future__ import annotations

import pytest

from container_stack import environment, synthesized


@pytest.mark.parametrize("name", ["staging", "prod"])
def test_every_zone_has_a_subnet_for_what_runs_and_none_hands_out_public_addresses(name: str) -> None:
    subnets = synthesized(name).all("EC2::Subnet")
    zones = environment(name).zones
    running = [subnet for logical, subnet in subnets.items() if "Workloads" in logical]
    assert sorted(subnet["AvailabilityZone"] for subnet in running) == sorted(zones)
    assert not any(subnet.get("MapPublicIpOnLaunch") for subnet in subnets.values())


def test_production_keeps_its_way_out_when_a_zone_fails() -> None:
    assert len(synthesized("prod").all("EC2::NatGateway")) == len(environment("prod").zones)
    assert len(synthesized("staging").all("EC2::NatGateway")) == 1


def test_audio_and_ledger_do_not_pass_the_nat_gateway() -> None:
    endpoints = synthesized("prod").all("EC2::VPCEndpoint").values()
    assert {endpoint["VpcEndpointType"] for endpoint in endpoints} == {"Gateway"}
    services = str([endpoint["ServiceName"] for endpoint in endpoints])
    assert ".s3" in services
    assert ".dynamodb" in services
    for endpoint in endpoints:
        assert len(endpoint["RouteTableIds"]) >= len(environment("prod").zones)


def test_without_upstream_providers_there_is_no_way_out_and_aws_is_reached_inside() -> None:
    template = synthesized("prod", providers=False)
    assert not template.all("EC2::NatGateway")
    workloads = [name for name in template.all("EC2::Route") if "Workloads" in name]
    assert not workloads
    interfaces = [e for e in template.all("EC2::VPCEndpoint").values() if e["VpcEndpointType"] == "Interface"]
    names = {endpoint["ServiceName"].rsplit("eu-central-1.", 1)[-1] for endpoint in interfaces}
    assert names == {"ecr.api", "ecr.dkr", "logs", "xray", "ecs", "ecs-agent", "ecs-telemetry"}
    assert all(endpoint["PrivateDnsEnabled"] for endpoint in interfaces)
    group = template.one("EC2::SecurityGroup", "NetworkEndpoints")
    assert [rule["CidrIp"] for rule in group["SecurityGroupIngress"]] == [template.one("EC2::VPC")["CidrBlock"]]


def test_cloudfront_finds_the_internet_gateway_that_a_vpc_origin_wants_also_without_nat() -> None:
    assert synthesized("prod", providers=False).all("EC2::VPCGatewayAttachment")


def test_all_traffic_is_logged_for_as_long_as_the_environment_says() -> None:
    template = synthesized("prod")
    flow = template.one("EC2::FlowLog")
    assert (flow["TrafficType"], flow["LogDestinationType"]) == ("ALL", "s3")
    bucket = template.one("S3::Bucket", "NetworkLogs")
    (rule,) = bucket["LifecycleConfiguration"]["Rules"]
    assert (rule["Status"], rule["ExpirationInDays"]) == ("Enabled", environment("prod").log_days)
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert bucket["BucketEncryption"]


def test_the_lambda_path_alone_has_no_network() -> None:
    assert not synthesized("dev").all("EC2::VPC")
