"""What is kept: the accounts' table, the staging bucket, the providers' keys, and the key that encrypts them."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from aws_cdk import CfnOutput, Duration, RemovalPolicy, Stack
from aws_cdk import aws_dynamodb as dynamodb
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra.constructs.rules import acknowledge
from infra.environments import Environment, InvalidEnvironment

_CATALOGS = Path(__file__).parents[2] / "functions" / "voxgate" / "catalog"


class Data(Construct):
    """`secrets` are by the name of their provider. Who may do what with it all is said here, in the
    `allow_` methods; no other construct gives rights to it."""

    def __init__(self, scope: Construct, id: str, *, environment: Environment) -> None:  # noqa: A002
        super().__init__(scope, id)
        variables = _key_variables(environment)
        self._environment = environment
        self._kept = RemovalPolicy.RETAIN if environment.production else RemovalPolicy.DESTROY
        self.key = kms.Key(
            self,
            "Key",
            alias=f"voxgate/{environment.name}",
            description=f"Voxgate {environment.name}: accounts, staged audio and results, providers' keys",
            enable_key_rotation=True,
            removal_policy=self._kept,
        )
        own = self._table()
        self.table = own if environment.restored_table is None else self._restored(environment.restored_table)
        # Also while the restored one is used: no stack can drop an export in the deployment in which another
        # stops reading it.
        for exported in (own.table_name, own.table_arn):
            Stack.of(self).export_value(exported)
        self.bucket = self._bucket()
        self.secrets = {name: self._secret(name) for name in environment.provider_secrets}
        # A fixed name each, so that no value of a secret has to be in a variable.
        self._references = {variables[name]: f"secret:{_secret_name(environment, name)}" for name in self.secrets}
        CfnOutput(self, "TableName", value=self.table.table_name, description="For voxgate's --table")
        CfnOutput(self, "BucketName", value=self.bucket.bucket_name)

    @property
    def variables(self) -> dict[str, str]:
        """By which a gateway finds what is kept here."""
        return {
            "VOXGATE_TABLE": self.table.table_name,
            "VOXGATE_STAGING_BUCKET": self.bucket.bucket_name,
            "VOXGATE_STAGING_KEY": self.key.key_arn,
            **self._references,
        }

    # What there is.

    def _table(self) -> dynamodb.Table:
        return dynamodb.Table(
            self,
            "Accounts",
            partition_key=dynamodb.Attribute(name="pk", type=dynamodb.AttributeType.STRING),
            sort_key=dynamodb.Attribute(name="sk", type=dynamodb.AttributeType.STRING),
            billing_mode=dynamodb.BillingMode.PAY_PER_REQUEST,
            time_to_live_attribute="ttl",
            encryption=dynamodb.TableEncryption.CUSTOMER_MANAGED,
            encryption_key=self.key,
            # Money: to any second of the last 35 days.
            point_in_time_recovery_specification=dynamodb.PointInTimeRecoverySpecification(
                point_in_time_recovery_enabled=True
            ),
            deletion_protection=self._environment.production,
            removal_policy=self._kept,
        )

    def _restored(self, name: str) -> dynamodb.ITable:
        arn = Stack.of(self).format_arn(service="dynamodb", resource="table", resource_name=name)
        return dynamodb.Table.from_table_attributes(self, "Restored", table_arn=arn, encryption_key=self.key)

    def _bucket(self) -> s3.Bucket:
        logs = s3.Bucket(
            self,
            "StagingLog",
            encryption=s3.BucketEncryption.S3_MANAGED,  # S3 delivers its logs under no other key policy of ours
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            lifecycle_rules=[
                s3.LifecycleRule(
                    id="log",
                    expiration=Duration.days(self._environment.log_days),
                    abort_incomplete_multipart_upload_after=Duration.days(1),
                )
            ],
            removal_policy=self._kept,
        )
        return s3.Bucket(
            self,
            "Staging",
            encryption=s3.BucketEncryption.KMS,
            encryption_key=self.key,
            bucket_key_enabled=True,  # one call to KMS for many objects
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            server_access_logs_bucket=logs,
            # No CORS: nothing hands uploads to browsers yet. No versions: what is removed is to be gone.
            lifecycle_rules=[
                s3.LifecycleRule(id="audio", prefix="staging/", expiration=Duration.days(1)),
                s3.LifecycleRule(id="results", prefix="results/", expiration=Duration.days(2)),
                s3.LifecycleRule(id="parts", abort_incomplete_multipart_upload_after=Duration.days(1)),
            ],
            removal_policy=self._kept,
        )

    def _secret(self, provider: str) -> secretsmanager.Secret:
        secret = secretsmanager.Secret(
            self,
            f"{provider.capitalize()}Key",
            secret_name=_secret_name(self._environment, provider),
            description=f"Voxgate {self._environment.name}: the API key at the provider '{provider}'",
            encryption_key=self.key,
            removal_policy=self._kept,
        )
        # Empty until an operator puts the key in: a made-up one would be sent to the provider.
        default = secret.node.default_child
        assert isinstance(default, secretsmanager.CfnSecret)
        default.generate_secret_string = None
        acknowledge(
            secret,
            "SMG4",
            "The provider issues this key and none of them offers an interface to renew it; docs/operations.md says "
            "how it is rotated by hand, which takes effect within five minutes.",
        )
        return secret

    # Who may do what with it.

    def allow_gateway(self, role: iam.IRole) -> None:
        """Serve customers: the `api` Lambda and the ingress."""
        self._allow_table(role, "BatchGetItem", "DeleteItem", "GetItem", "PutItem", "Query", "UpdateItem")
        self._allow_objects(role, "staging", "PutObject", "DeleteObject")
        self._allow_objects(role, "results", "PutObject", "GetObject")
        # Without it S3 says 403, not 404, of an object that is not there. A condition on the prefix would
        # never hold for that: it is GetObject that is judged.
        _allow(role, ["s3:ListBucket"], [self.bucket.bucket_arn])
        self._allow_key(role, "dynamodb", "Decrypt", "DescribeKey")
        self._allow_key(role, "s3", "Decrypt", "GenerateDataKey")
        if self.secrets:
            _allow(role, ["secretsmanager:GetSecretValue"], [secret.secret_arn for secret in self.secrets.values()])
            self._allow_key(role, "secretsmanager", "Decrypt")

    def allow_sweeper(self, role: iam.IRole) -> None:
        """Give back what died with its process, and read the whole ledger for the audit."""
        self._allow_table(role, "BatchGetItem", "GetItem", "Query", "UpdateItem")
        self._allow_key(role, "dynamodb", "Decrypt", "DescribeKey")

    def allow_inference(self, role: iam.IRole) -> None:
        """Read the audio that a gateway has staged, and nothing else: not the names of what there is, either, so
        that what takes this process over, by the audio that it decodes, finds none but that."""
        self._allow_objects(role, "staging", "GetObject")
        self._allow_key(role, "s3", "Decrypt")

    def _allow_table(self, role: iam.IRole, *actions: str) -> None:
        _allow(role, [f"dynamodb:{action}" for action in actions], [self.table.table_arn])

    def _allow_objects(self, role: iam.IRole, prefix: str, *actions: str) -> None:
        _allow(role, [f"s3:{action}" for action in actions], [self.bucket.arn_for_objects(f"{prefix}/*")])
        acknowledge(
            role,
            "IAM5",
            f"The objects under {prefix}/ of the one bucket: their names are not known before a request comes.",
            f"Resource::{self._shown(role)}/{prefix}/*",
        )

    def _shown(self, role: iam.IRole) -> str:
        """The bucket's ARN as the rules engine writes it, which is by where the role is."""
        stack = Stack.of(self)
        if Stack.of(role).node.addr != stack.node.addr:
            return str(stack.resolve(stack.export_value(self.bucket.bucket_arn))["Fn::ImportValue"])
        resource = self.bucket.node.default_child
        assert isinstance(resource, s3.CfnBucket)
        return f"<{stack.get_logical_id(resource)}.Arn>"

    # DescribeKey: DynamoDB looks at the state of a table's key in the name of who reads the table.
    def _allow_key(self, role: iam.IRole, service: str, *actions: str) -> None:
        """For that service alone, which uses the key in the role's name."""
        region = Stack.of(self).region
        role.add_to_principal_policy(
            iam.PolicyStatement(
                actions=[f"kms:{action}" for action in actions],
                resources=[self.key.key_arn],
                conditions={"StringEquals": {"kms:ViaService": f"{service}.{region}.amazonaws.com"}},
            )
        )


def _allow(role: iam.IRole, actions: Sequence[str], resources: Sequence[str]) -> None:
    role.add_to_principal_policy(iam.PolicyStatement(actions=list(actions), resources=list(resources)))


def _secret_name(environment: Environment, provider: str) -> str:
    return f"voxgate/{environment.name}/{provider}"


def _key_variables(environment: Environment) -> dict[str, str]:
    """The variables in which the catalogue expects its providers' keys. Raises `InvalidEnvironment`."""
    document = tomllib.loads((_CATALOGS / f"{environment.catalog}.toml").read_text(encoding="utf-8"))
    keys = {name: str(entry.get("api_key", "")) for name, entry in document["providers"].items()}
    variables = {name: key.removeprefix("env:") for name, key in keys.items() if key.startswith("env:")}
    for name in environment.provider_secrets:
        if name not in variables:
            raise InvalidEnvironment(
                f"The environment '{environment.name}': provider_secrets names '{name}', for which the catalogue "
                f"'{environment.catalog}' takes no key from the environment."
            )
    return variables
