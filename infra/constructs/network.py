"""The private network of the containers: where there is no ingress and no inference, there is none."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.constructs.rules import acknowledge
from infra.environments import Environment

_CIDR = "10.40.0.0/16"


class Network(Construct):
    """`vpc`, `workloads` (the subnets of everything that runs) and `logs`, the bucket that takes the flow
    logs and the load balancers' access logs."""

    def __init__(self, scope: Construct, id: str, *, environment: Environment) -> None:  # noqa: A002
        super().__init__(scope, id)
        reaches_out = bool(environment.provider_secrets)
        gateways = 0 if not reaches_out else len(environment.zones) if environment.production else 1
        self.vpc = ec2.Vpc(
            self,
            "Vpc",
            availability_zones=list(environment.zones),
            ip_addresses=ec2.IpAddresses.cidr(_CIDR),
            nat_gateways=gateways,
            # Nothing is ever started in the default group, and closing it would take a function that may
            # change security groups.
            restrict_default_security_group=False,
            subnet_configuration=[
                # Also without NAT: a VPC origin of CloudFront wants an internet gateway in its VPC.
                ec2.SubnetConfiguration(
                    name="Public", subnet_type=ec2.SubnetType.PUBLIC, cidr_mask=24, map_public_ip_on_launch=False
                ),
                ec2.SubnetConfiguration(
                    name="Workloads",
                    subnet_type=ec2.SubnetType.PRIVATE_WITH_EGRESS if reaches_out else ec2.SubnetType.PRIVATE_ISOLATED,
                    cidr_mask=20,
                ),
            ],
        )
        self.workloads = ec2.SubnetSelection(subnet_group_name="Workloads")
        # These two cost nothing, and keep the audio and the ledger off the NAT gateways' bill.
        self.vpc.add_gateway_endpoint("S3", service=ec2.GatewayVpcEndpointAwsService.S3)
        self.vpc.add_gateway_endpoint("DynamoDb", service=ec2.GatewayVpcEndpointAwsService.DYNAMODB)
        if not reaches_out:
            self._interface_endpoints(gpu=environment.inference is not None)
        self.logs = self._log_bucket(environment)
        self.vpc.add_flow_log("FlowLog", destination=ec2.FlowLogDestination.to_s3(self.logs, "flow/"))

    def _interface_endpoints(self, *, gpu: bool) -> None:
        # Each costs about 8 dollars a month in each zone, one NAT gateway 35: they pay only in its place.
        # None for Secrets Manager: where nothing is called outside, there is no provider's key to read.
        services = {
            "EcrApi": ec2.InterfaceVpcEndpointAwsService.ECR,
            "EcrDocker": ec2.InterfaceVpcEndpointAwsService.ECR_DOCKER,
            "Logs": ec2.InterfaceVpcEndpointAwsService.CLOUDWATCH_LOGS,
            "XRay": ec2.InterfaceVpcEndpointAwsService.XRAY,
        }
        if gpu:  # the agent on an instance; on Fargate it goes another way
            services |= {
                "Ecs": ec2.InterfaceVpcEndpointAwsService.ECS,
                "EcsAgent": ec2.InterfaceVpcEndpointAwsService.ECS_AGENT,
                "EcsTelemetry": ec2.InterfaceVpcEndpointAwsService.ECS_TELEMETRY,
            }
        group = ec2.SecurityGroup(
            self,
            "Endpoints",
            vpc=self.vpc,
            allow_all_outbound=False,
            description="Voxgate: endpoints of AWS, for this VPC alone",
        )
        group.add_ingress_rule(ec2.Peer.ipv4(_CIDR), ec2.Port.tcp(443))
        for name, service in services.items():
            self.vpc.add_interface_endpoint(
                name, service=service, subnets=self.workloads, security_groups=[group], open=False
            )

    def _log_bucket(self, environment: Environment) -> s3.Bucket:
        bucket = s3.Bucket(
            self,
            "Logs",
            # Load balancers cannot write where a key of KMS is asked for.
            encryption=s3.BucketEncryption.S3_MANAGED,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            lifecycle_rules=[
                s3.LifecycleRule(
                    expiration=cdk.Duration.days(environment.log_days),
                    abort_incomplete_multipart_upload_after=cdk.Duration.days(1),
                )
            ],
            # What happened can be looked up after the stack is gone; the lifecycle empties it.
            removal_policy=cdk.RemovalPolicy.RETAIN,
        )
        acknowledge(bucket, "S1", "It takes the access logs; a log of the access to it, in itself, would never end.")
        return bucket
