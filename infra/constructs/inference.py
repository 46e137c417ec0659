"""Our own recognizer: one task for each GPU instance, behind an internal load balancer."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_applicationautoscaling as appscaling
from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecr_assets as assets
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.constructs import container
from infra.constructs.data import Data
from infra.constructs.metrics import queued_audio
from infra.constructs.network import Network
from infra.constructs.rules import acknowledge
from infra.environments import Environment
from infra.environments import Inference as Sizes

# An hour of audio is minutes of work: so long a task that is to go keeps the requests it has.
_DRAIN = cdk.Duration.seconds(600)
_DISK = 100  # GiB: the image with CUDA and the model, twice during a deployment, and what is being decoded


class Inference(Construct):
    """`url` is for `VOXGATE_INFERENCE_URL`; nobody reaches it who was not let in with `allow_from`.

    How many tasks run follows `QueuedAudioSeconds` (`metrics.py`), which each task reports once a minute: the
    seconds of audio that wait there or are being worked on, 0 too. Their average is what one task has.
    The instances follow the tasks. `log_group` has the lines and metrics.

    Where `fewest` is 0, the last task goes after a quarter of an hour of zeroes. The next request then
    finds a load balancer without targets, which answers 503; the gateway takes another provider, or says
    502, and the load balancer's own count of those 503 starts the first task, which takes some minutes.
    """

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        environment: Environment,
        network: Network,
        data: Data,
    ) -> None:
        super().__init__(scope, id)
        sizes = environment.inference
        if sizes is None:
            raise ValueError(f"The environment '{environment.name}' has no inference.")
        self.log_group = container.log_group(self, "Log", environment=environment)
        self.cluster = ecs.Cluster(
            self, "Cluster", vpc=network.vpc, container_insights_v2=ecs.ContainerInsights.ENHANCED
        )
        machine = ec2.InstanceType(sizes.instance_type)
        if machine.architecture != ec2.InstanceArchitecture.X86_64:
            raise ValueError(f"{sizes.instance_type}: the inference image is built for x86-64.")
        provider = self._capacity(sizes, network, machine)
        task = self._task(environment, sizes, data)
        self.task_role = task.task_role
        data.allow_inference(self.task_role)
        self.service = self._service(task, network, provider)
        self.load_balancer = self._load_balancer(environment, network)
        self.url = f"http://{self.load_balancer.load_balancer_dns_name}"
        self._scale(environment, sizes)

    def allow_from(self, peer: ec2.IConnectable) -> None:
        self.load_balancer.connections.allow_from(peer, ec2.Port.tcp(80), "the gateway")

    def unserved(self, *, period: cdk.Duration) -> cloudwatch.Metric:
        """The requests that found no task at all."""
        return self.load_balancer.metrics.http_code_elb(elbv2.HttpCodeElb.ELB_503_COUNT, statistic="Sum", period=period)

    def _capacity(self, sizes: Sizes, network: Network, machine: ec2.InstanceType) -> ecs.AsgCapacityProvider:
        user_data = ec2.UserData.for_linux()
        # The instance's role is the agent's; a task has its own.
        user_data.add_commands("echo ECS_AWSVPC_BLOCK_IMDS=true >> /etc/ecs/ecs.config")
        template = ec2.LaunchTemplate(
            self,
            "Template",
            instance_type=machine,
            # An SSM parameter of AWS, read at each deployment: new instances have the newest drivers.
            machine_image=ecs.EcsOptimizedImage.amazon_linux2023(ecs.AmiHardwareType.GPU),
            user_data=user_data,
            # CDK would add ecs:Submit* on it, and logging, which is the execution role's.
            role=self._instance_role().without_policy_updates(),
            security_group=ec2.SecurityGroup(
                self, "Instances", vpc=network.vpc, description="Voxgate: GPU instances, whose tasks have their own"
            ),
            require_imdsv2=True,
            http_put_response_hop_limit=1,
            block_devices=[
                ec2.BlockDevice(
                    device_name="/dev/xvda",
                    volume=ec2.BlockDeviceVolume.ebs(
                        _DISK, encrypted=True, volume_type=ec2.EbsDeviceVolumeType.GP3, delete_on_termination=True
                    ),
                )
            ],
        )
        group = autoscaling.AutoScalingGroup(
            self,
            "Machines",
            vpc=network.vpc,
            vpc_subnets=network.workloads,
            launch_template=template,
            min_capacity=0,
            max_capacity=sizes.most + 1,  # a deployment starts the new before it stops the old
        )
        acknowledge(
            group,
            "AS3",
            "ECS starts and stops the machines as tasks come and go; the alarms tell what customers feel of it.",
        )
        provider = ecs.AsgCapacityProvider(
            self,
            "Capacity",
            auto_scaling_group=group,
            enable_managed_scaling=True,
            target_capacity_percent=100,
            # Machines are protected while a task is on them, and ECS takes the protection off an empty one:
            # so a busy machine never goes in place of an idle one, and the last one still goes. Before the
            # stack is deleted, its service is set to 0 tasks until the machines are gone.
            enable_managed_termination_protection=True,
            enable_managed_draining=True,
        )
        self.cluster.add_asg_capacity_provider(provider)
        return provider

    def _instance_role(self) -> iam.Role:
        """What the ECS agent needs, on this cluster. Images and logs are the execution role's."""
        role = iam.Role(self, "InstanceRole", assumed_by=iam.ServicePrincipal("ec2.amazonaws.com"))
        instances = cdk.Stack.of(self).format_arn(
            service="ecs", resource="container-instance", resource_name=f"{self.cluster.cluster_name}/*"
        )
        for actions, resource in (
            (
                [
                    "ecs:DeregisterContainerInstance",
                    "ecs:RegisterContainerInstance",
                    "ecs:SubmitAttachmentStateChanges",
                    "ecs:SubmitContainerStateChange",
                    "ecs:SubmitTaskStateChange",
                ],
                self.cluster.cluster_arn,
            ),
            (["ecs:Poll", "ecs:StartTelemetrySession"], instances),
            (["ecs:DiscoverPollEndpoint"], "*"),
        ):
            role.add_to_policy(iam.PolicyStatement(actions=actions, resources=[resource]))
        acknowledge(role, "IAM5", "ecs:DiscoverPollEndpoint knows no resource.", "Resource::*")
        acknowledge(
            role,
            "IAM5",
            "An instance gets its id when it registers; its cluster is named.",
            self._instances_as_found(),
        )
        return role

    def _instances_as_found(self) -> str:
        """The instances of this cluster, as cdk-nag names them in its finding."""
        stack = cdk.Stack.of(self)
        account = "<AWS::AccountId>" if cdk.Token.is_unresolved(stack.account) else stack.account
        resource = self.cluster.node.default_child
        assert isinstance(resource, ecs.CfnCluster)
        cluster = stack.get_logical_id(resource)
        return f"Resource::arn:aws:ecs:{stack.region}:{account}:container-instance/<{cluster}>/*"

    def _task(self, environment: Environment, sizes: Sizes, data: Data) -> ecs.Ec2TaskDefinition:
        task = ecs.Ec2TaskDefinition(self, "Task", network_mode=ecs.NetworkMode.AWS_VPC)
        container.add_container(
            task,
            # The model is in the image: a start depends on nobody's download.
            image=container.image(
                "inference", platform=assets.Platform.LINUX_AMD64, build_args={"WHISPER_MODEL": sizes.model}
            ),
            group=self.log_group,
            variables={
                "VOXGATE_ENVIRONMENT": environment.name,
                "VOXGATE_STAGING_BUCKET": data.bucket.bucket_name,
                "VOXGATE_DRAIN_SECONDS": str(int(_DRAIN.to_seconds()) - 10),  # the rest is for its own end
                "VOXGATE_WHISPER_MODEL": sizes.model,
                "VOXGATE_WHISPER_DEVICE": "cuda",
            },
            stop_timeout=_DRAIN,
            gpus=1,
            memory=4096,  # a floor; the GPU is what decides that one task fills a machine
        )
        return task

    def _service(
        self, task: ecs.Ec2TaskDefinition, network: Network, provider: ecs.AsgCapacityProvider
    ) -> ecs.Ec2Service:
        group = ec2.SecurityGroup(
            self,
            "Tasks",
            vpc=network.vpc,
            allow_all_outbound=False,
            description="Voxgate: tasks of the inference service",
        )
        group.add_egress_rule(ec2.Peer.any_ipv4(), ec2.Port.tcp(443))  # S3, over its gateway endpoint
        service = ecs.Ec2Service(
            self,
            "Service",
            cluster=self.cluster,
            task_definition=task,
            capacity_provider_strategies=[
                ecs.CapacityProviderStrategy(capacity_provider=provider.capacity_provider_name, weight=1)
            ],
            vpc_subnets=network.workloads,
            security_groups=[group],
            min_healthy_percent=100,
            max_healthy_percent=200,
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            # The model is loaded from a disk that is still cold.
            health_check_grace_period=cdk.Duration.minutes(10),
            enable_execute_command=False,
            propagate_tags=ecs.PropagatedTagSource.SERVICE,
        )
        service.node.add_dependency(provider)  # deleted in that order too: a provider in use cannot go
        return service

    def _load_balancer(self, environment: Environment, network: Network) -> elbv2.ApplicationLoadBalancer:
        balancer = elbv2.ApplicationLoadBalancer(
            self,
            "LoadBalancer",
            vpc=network.vpc,
            vpc_subnets=network.workloads,
            internet_facing=False,
            security_group=ec2.SecurityGroup(
                self,
                "FromGateway",
                vpc=network.vpc,
                allow_all_outbound=False,
                description="Voxgate: load balancer of the inference service, for the gateway alone",
            ),
            idle_timeout=_DRAIN,  # an answer comes when the whole of the audio is done
            drop_invalid_header_fields=True,
            deletion_protection=environment.production,
        )
        balancer.log_access_logs(network.logs, "inference")
        # Rather than a slow start, which excludes it: a task is ready once its model is loaded, and
        # the next request belongs to the one that has the fewest.
        container.add_targets(balancer, self.service, health="/health/ready", failures=6, drain=_DRAIN)
        return balancer

    def _scale(self, environment: Environment, sizes: Sizes) -> None:
        scaling = self.service.auto_scale_task_count(min_capacity=sizes.fewest, max_capacity=sizes.most)
        scaling.scale_to_track_custom_metric(
            "Queue",
            metric=queued_audio(environment),
            target_value=sizes.queued_seconds,
            scale_in_cooldown=cdk.Duration.minutes(10),
            scale_out_cooldown=cdk.Duration.minutes(3),
        )
        if sizes.fewest:
            return
        # Target tracking never leaves zero: nobody is there to report a queue.
        scaling.scale_on_metric(
            "First",
            metric=self.unserved(period=cdk.Duration.minutes(1)),
            scaling_steps=[
                appscaling.ScalingInterval(upper=0, change=0),
                appscaling.ScalingInterval(lower=1, change=+1),
            ],
            adjustment_type=appscaling.AdjustmentType.CHANGE_IN_CAPACITY,
            # As long as a machine takes to start: while the first one comes, no second one is asked for.
            cooldown=cdk.Duration.minutes(10),
        )
