"""IAM without an account: what the templates let a role do, and what botocore's calls would ask of it.

`Deployed` reads the templates as a deployment would: each reference is the name of a resource. `rights` are a
role's statements, one for each action, resource and value of a condition. `Recorder` takes down the calls of
every client in this process, and `needs` says what IAM would be asked for each of them.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from botocore import handlers

from synthesized import Synthesized

ACCOUNT = "123456789012"
_ARNS = {
    "AWS::DynamoDB::Table": "arn:aws:dynamodb:{region}:{account}:table/{name}",
    "AWS::KMS::Key": "arn:aws:kms:{region}:{account}:key/{name}",
    "AWS::Logs::LogGroup": "arn:aws:logs:{region}:{account}:log-group:{name}:*",
    "AWS::S3::Bucket": "arn:aws:s3:::{name}",
}


class Deployed:
    """`known` are what a deployment makes up: by the resource's stack and logical id, as `Data/DataKey1234`, what
    a `Ref` to it is, and by that with an attribute, as `Service/LoadBalancer5678.DNSName`, what that is."""

    def __init__(self, synthesized: Synthesized, known: Mapping[str, str] | None = None) -> None:
        self._synthesized = synthesized
        self._region = synthesized.environment.region
        self._known = known or {}
        self._exports = {
            output["Export"]["Name"]: (stack, output["Value"])
            for stack, template in synthesized.templates.items()
            for output in template.get("Outputs", {}).values()
            if "Export" in output
        }

    def named(self, kind: str, name: str) -> str:
        """What a `Ref` gives of the one resource of that kind whose stack and logical id begin with `name`."""
        (found,) = [found for found, _ in self._synthesized.all(kind) if found.startswith(name)]
        return self._of(found)

    def value(self, stack: str, value: Any) -> str:
        match value:
            case str():
                return value
            case {"Ref": str(name)}:
                return self._pseudo(name) if name.startswith("AWS::") else self._attribute(stack, name, "")
            case {"Fn::GetAtt": [name, attribute]}:
                return self._attribute(stack, name, attribute)
            case {"Fn::Join": [separator, parts]}:
                return str(separator).join(self.value(stack, part) for part in parts)
            case {"Fn::Sub": str(text)}:
                return re.sub(r"\$\{([\w:]+)\}", lambda found: self.value(stack, {"Ref": found[1]}), text)
            case {"Fn::ImportValue": name}:
                return self.value(*self._exports[self.value(stack, name)])
            case {"Fn::GetStackOutput": {"StackName": name, "OutputName": output}}:
                other = self.value(stack, name).rsplit("-", 1)[-1]
                return self.value(other, self._synthesized.templates[other]["Outputs"][output]["Value"])
        raise AssertionError(f"what is {value!r}?")

    def variables(self, stack: str, given: Any) -> dict[str, str]:
        """A function's or a container's environment."""
        pairs = given.items() if isinstance(given, dict) else [(one["Name"], one["Value"]) for one in given]
        return {name: self.value(stack, value) for name, value in pairs}

    def rights(self, role: str) -> set[Right]:
        """Of the one role whose logical id, in the stack `Service`, begins so."""
        found: set[Right] = set()
        for name, policy in self._synthesized.all("IAM::Policy"):
            stack = name.partition("/")[0]
            if not any(self.value(stack, one).startswith(role) for one in policy["Properties"]["Roles"]):
                continue
            for statement in policy["Properties"]["PolicyDocument"]["Statement"]:
                assert statement["Effect"] == "Allow"
                assert statement.keys() <= {"Action", "Condition", "Effect", "Resource", "Sid"}, statement
                conditions = [
                    [(key, self.value(stack, one)) for one in _listed(wanted)]
                    for operator, keys in statement.get("Condition", {}).items()
                    for key, wanted in keys.items()
                    if _understood(operator)
                ]
                resources = [self.value(stack, one) for one in _listed(statement["Resource"])]
                found |= {
                    Right(action, resource, tuple(chosen))
                    for action in _listed(statement["Action"])
                    for resource in resources
                    for chosen in itertools.product(*conditions)
                }
        return found

    def encrypted(self) -> dict[str, str]:
        """Each table's, bucket's and secret's ARN, with that of the key under which it is encrypted."""
        keys: dict[str, Any] = {}
        for name, table in self._synthesized.all("DynamoDB::Table"):
            keys[self._of(name, "Arn")] = name, table["Properties"]["SSESpecification"]["KMSMasterKeyId"]
        for name, bucket in self._synthesized.all("S3::Bucket"):
            (rule,) = bucket["Properties"]["BucketEncryption"]["ServerSideEncryptionConfiguration"]
            if key := rule["ServerSideEncryptionByDefault"].get("KMSMasterKeyID"):
                keys[self._of(name, "Arn")] = name, key
        for name, secret in self._synthesized.all("SecretsManager::Secret"):
            keys[self._of(name)] = name, secret["Properties"]["KmsKeyId"]
        return {arn: self.value(name.partition("/")[0], key) for arn, (name, key) in keys.items()}

    def _of(self, place: str, attribute: str = "") -> str:
        stack, _, name = place.partition("/")
        return self._attribute(stack, name, attribute)

    def _pseudo(self, name: str) -> str:
        values = {"AccountId": ACCOUNT, "Partition": "aws", "Region": self._region, "URLSuffix": "amazonaws.com"}
        return values[name.removeprefix("AWS::")]

    def _attribute(self, stack: str, name: str, attribute: str) -> str:
        place = f"{stack}/{name}"
        own = self._known.get(place, name)
        if not attribute:
            return own
        kind = self._synthesized.templates[stack]["Resources"][name]["Type"]
        if attribute == "Arn" and kind in _ARNS:
            return _ARNS[kind].format(region=self._region, account=ACCOUNT, name=own)
        return self._known.get(f"{place}.{attribute}", f"{name}.{attribute}")


@dataclass(frozen=True, order=True)
class Right:
    """One action on one resource, both with `*` and `?`, where each key of `conditions` has its value."""

    action: str
    resource: str
    conditions: tuple[tuple[str, str], ...] = ()

    def allows(self, need: Need) -> bool:
        asked = dict(need.context)
        return (
            _like(self.action, need.action)
            and _like(self.resource, need.resource)
            and all(asked.get(key) == value for key, value in self.conditions)
        )

    def __str__(self) -> str:
        wanted = "".join(f" if {key} is {value}" for key, value in self.conditions)
        return f"{self.action} on {self.resource}{wanted}"


@dataclass(frozen=True, order=True)
class Need:
    """What IAM is asked: may this be done, with these values of the condition keys."""

    action: str
    resource: str
    context: tuple[tuple[str, str], ...] = ()


def missing(rights: set[Right], asked: set[Need]) -> list[Need]:
    return sorted(need for need in asked if not any(right.allows(need) for right in rights))


def spare(rights: set[Right], asked: set[Need]) -> list[Right]:
    return sorted(right for right in rights if not any(right.allows(need) for need in asked))


@dataclass(frozen=True)
class Call:
    service: str
    operation: str
    parameters: Mapping[str, Any]
    status: int


@dataclass
class Recorder:
    """The calls of every client that was made while it runs, whatever thread it is called in."""

    calls: list[Call] = field(default_factory=list)
    _on: bool = False

    @contextlib.contextmanager
    def running(self) -> Iterator[Recorder]:
        own = [("before-parameter-build", self._begin), ("after-call", self._end)]
        handlers.BUILTIN_HANDLERS.extend(own)  # as moto does: each session that is made has them
        try:
            yield self
        finally:
            for one in own:
                handlers.BUILTIN_HANDLERS.remove(one)

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Only what is called in here counts: the rest is the test's own."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    @staticmethod
    def _begin(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        context["parameters"] = dict(params)

    def _end(self, model: Any, context: dict[str, Any], http_response: Any, **_: Any) -> None:
        if self._on:
            service = model.service_model.endpoint_prefix
            self.calls.append(Call(service, model.name, context["parameters"], http_response.status_code))


@dataclass(frozen=True)
class Needs:
    """What IAM is asked for a call. `secrets` are ARNs by name, `encrypted` as `Deployed.encrypted` gives them."""

    region: str
    secrets: Mapping[str, str]
    encrypted: Mapping[str, str]

    def of(self, calls: list[Call]) -> set[Need]:
        found: set[Need] = set()
        for call in calls:
            match call.service:
                case "dynamodb":
                    found |= self._dynamodb(call)
                case "s3":
                    found |= self._s3(call)
                case "secretsmanager":
                    found |= self._secretsmanager(call)
                case _:
                    raise AssertionError(f"nobody said what {call.service}:{call.operation} needs")
        return found

    def _dynamodb(self, call: Call) -> set[Need]:
        """A transaction is asked for by its parts, `ConditionCheck` as `ConditionCheckItem`; a batch for each of
        its tables. A table under a key of the account's is decrypted in the caller's name, and the key looked at.
        https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazondynamodb.html
        https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/encryption.usagenotes.html
        """
        parameters = call.parameters
        if call.operation == "TransactWriteItems":
            asked = {
                (f"{verb}Item", part["TableName"]) for one in parameters["TransactItems"] for verb, part in one.items()
            }
        elif call.operation == "BatchGetItem":
            asked = {(call.operation, table) for table in parameters["RequestItems"]}
        else:
            assert call.operation in ("DeleteItem", "GetItem", "PutItem", "Query", "UpdateItem"), call.operation
            asked = {(call.operation, parameters["TableName"])}
        found = set()
        for action, table in asked:
            arn = f"arn:aws:dynamodb:{self.region}:{ACCOUNT}:table/{table}"
            found |= {Need(f"dynamodb:{action}", arn), *self._key("dynamodb", arn, "Decrypt", "DescribeKey")}
        return found

    def _s3(self, call: Call) -> set[Need]:
        """Under a key of the account's, what is written needs a data key and what is read its decryption. That an
        object is not there is said, with 404, to who may list the bucket; to others S3 says 403.
        https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html#API_GetObject_RequestSyntax
        https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingKMSEncryption.html
        """
        bucket = f"arn:aws:s3:::{call.parameters['Bucket']}"
        named = f"{bucket}/{call.parameters['Key']}"
        own = call.parameters.get("SSEKMSKeyId")
        assert call.status < 400 or (call.operation, call.status) == ("GetObject", 404), call
        match call.operation:
            case "PutObject":
                return {Need("s3:PutObject", named), *self._key("s3", bucket, "GenerateDataKey", own=own)}
            case "GetObject" if call.status == 404:
                return {Need("s3:GetObject", named), Need("s3:ListBucket", bucket)}
            case "GetObject":
                return {Need("s3:GetObject", named), *self._key("s3", bucket, "Decrypt")}
            case "DeleteObject":
                return {Need("s3:DeleteObject", named)}
        raise AssertionError(f"nobody said what s3:{call.operation} needs")

    def _secretsmanager(self, call: Call) -> set[Need]:
        """https://docs.aws.amazon.com/secretsmanager/latest/userguide/security-encryption.html"""
        assert call.operation == "GetSecretValue", call.operation
        arn = self.secrets[call.parameters["SecretId"]]
        return {Need("secretsmanager:GetSecretValue", arn), *self._key("secretsmanager", arn, "Decrypt")}

    def _key(self, service: str, arn: str, *actions: str, own: str | None = None) -> set[Need]:
        key = own or self.encrypted.get(arn)
        if key is None:
            return set()
        via = (("kms:ViaService", f"{service}.{self.region}.amazonaws.com"),)
        return {Need(f"kms:{action}", key, via) for action in actions}


def _understood(operator: str) -> bool:
    assert operator == "StringEquals", f"nobody said how {operator} is judged"
    return True


def _like(pattern: str, text: str) -> bool:
    parts = (".*" if one == "*" else "." if one == "?" else re.escape(one) for one in pattern)
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
