from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from aws_cdk import App, Stack

from infra.constructs.data import Data
from infra.environments import ENVIRONMENTS, InvalidEnvironment
from synthesized import Synthesized, shown, synthesize


def test_the_table_is_the_one_that_the_store_expects(each: Synthesized) -> None:
    table = each.one("DynamoDB::Table")
    assert table["KeySchema"] == [
        {"AttributeName": "pk", "KeyType": "HASH"},
        {"AttributeName": "sk", "KeyType": "RANGE"},
    ]
    assert table["TimeToLiveSpecification"] == {"AttributeName": "ttl", "Enabled": True}
    assert table["BillingMode"] == "PAY_PER_REQUEST"


def test_the_table_can_be_had_back_to_the_second_and_not_be_deleted_in_production(each: Synthesized) -> None:
    table = each.one("DynamoDB::Table")
    assert table["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert table["DeletionProtectionEnabled"] is each.environment.production


def test_a_restored_table_takes_the_place_of_the_own_one_which_stays_exported(tmp_path: Path) -> None:
    name = "Voxgate-prod-Data-restored"
    restored = synthesize(dataclasses.replace(ENVIRONMENTS["prod"], account=None, restored_table=name), tmp_path)
    for function in restored.properties("Lambda::Function"):
        assert function["Environment"]["Variables"]["VOXGATE_TABLE"] == name
    (rights,) = [
        statement["Resource"]
        for policy in restored.properties("IAM::Policy", name="SweeperHost")
        for statement in policy["PolicyDocument"]["Statement"]
        if "dynamodb:Query" in statement["Action"]
    ]
    assert shown(rights) == f"arn:aws:dynamodb:eu-central-1:<AWS::AccountId>:table/{name}"
    assert len(restored.properties("DynamoDB::Table")) == 1
    kept = [shown(output["Value"]) for output in restored.templates["Data"]["Outputs"].values() if "Export" in output]
    assert {"<DataAccounts>", "<DataAccounts.Arn>"} <= set(kept)
    with pytest.raises(InvalidEnvironment, match="restored_table"):
        dataclasses.replace(ENVIRONMENTS["prod"], restored_table="arn:aws:dynamodb:::table/x")


def test_accounts_audio_and_provider_keys_are_encrypted_by_the_key_of_the_environment(each: Synthesized) -> None:
    assert each.one("KMS::Key", name="Data/")["EnableKeyRotation"] is True
    table = each.one("DynamoDB::Table")["SSESpecification"]
    bucket = _staging(each)["BucketEncryption"]["ServerSideEncryptionConfiguration"][0]["ServerSideEncryptionByDefault"]
    secrets = each.properties("SecretsManager::Secret", name="Data/")
    keys = [table["KMSMasterKeyId"], bucket["KMSMasterKeyID"], *(secret["KmsKeyId"] for secret in secrets)]
    assert {shown(key) for key in keys} == {"<DataKey.Arn>"}
    assert (table["SSEEnabled"], bucket["SSEAlgorithm"]) == (True, "aws:kms")


def test_every_bucket_is_closed_to_the_public_encrypted_and_for_tls_alone(each: Synthesized) -> None:
    policies = {shown(policy["Bucket"]): policy["PolicyDocument"] for policy in each.properties("S3::BucketPolicy")}
    closed = ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets")
    buckets = [*each.all("S3::Bucket")]
    assert buckets
    for name, resource in buckets:
        bucket = resource["Properties"]
        assert bucket["PublicAccessBlockConfiguration"] == dict.fromkeys(closed, True), name
        assert bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"], name
        assert "AccessControl" not in bucket, name
        statements = policies[f"<{name.partition('/')[2][:-8]}>"]["Statement"]
        assert any(_needs_tls(statement) for statement in statements), name
        allowed = [json.dumps(one["Principal"]) for one in statements if one["Effect"] == "Allow"]
        assert not [principal for principal in allowed if '"*"' in principal], name


def test_audio_goes_after_a_day_results_after_two_and_parts_of_uploads_after_one(each: Synthesized) -> None:
    rules = {rule["Id"]: rule for rule in _staging(each)["LifecycleConfiguration"]["Rules"]}
    assert all(rule["Status"] == "Enabled" for rule in rules.values())
    assert (rules["audio"]["Prefix"], rules["audio"]["ExpirationInDays"]) == ("staging/", 1)
    assert (rules["results"]["Prefix"], rules["results"]["ExpirationInDays"]) == ("results/", 2)
    assert rules["parts"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert "Prefix" not in rules["parts"]


def test_the_staging_bucket_keeps_no_versions_and_answers_no_browser(each: Synthesized) -> None:
    bucket = _staging(each)
    assert "VersioningConfiguration" not in bucket  # what is removed is to be gone
    assert "CorsConfiguration" not in bucket


def test_the_secrets_are_empty_until_an_operator_fills_them(each: Synthesized) -> None:
    secrets = each.properties("SecretsManager::Secret", name="Data/")
    assert {secret["Name"] for secret in secrets} == {
        f"voxgate/{each.environment.name}/{provider}" for provider in each.environment.provider_secrets
    }
    for secret in secrets:
        assert not {"SecretString", "GenerateSecretString"} & set(secret)


def test_a_gateway_finds_each_key_where_its_catalogue_looks_for_it(each: Synthesized) -> None:
    variables = each.one("Lambda::Function", name="ApiHost")["Environment"]["Variables"]
    name = each.environment.name
    assert variables["OPENAI_API_KEY"] == f"secret:voxgate/{name}/openai"
    assert variables["DEEPGRAM_API_KEY"] == f"secret:voxgate/{name}/deepgram"
    assert shown(variables["VOXGATE_TABLE"]) == "<Data/DataAccounts>"
    assert shown(variables["VOXGATE_STAGING_BUCKET"]) == "<Data/DataStaging>"
    assert shown(variables["VOXGATE_STAGING_KEY"]) == "<Data/DataKey.Arn>"


def test_a_key_for_a_provider_that_the_catalogue_does_not_have_is_refused() -> None:
    environment = dataclasses.replace(ENVIRONMENTS["dev"], provider_secrets=("openai", "nobody"))
    with pytest.raises(InvalidEnvironment, match="names 'nobody'"):
        Data(Stack(App()), "Data", environment=environment)


def _staging(synthesized: Synthesized) -> Any:
    (bucket,) = [
        one for one in synthesized.properties("S3::Bucket", name="Data/DataStaging") if "LoggingConfiguration" in one
    ]
    return bucket


def _needs_tls(statement: Any) -> bool:
    return bool(
        statement["Effect"] == "Deny"
        and statement["Action"] == "s3:*"
        and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        and len(statement["Resource"]) == 2
    )
