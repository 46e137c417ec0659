from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import aws_cdk.aws_apigateway as apigateway
import pytest

from infra.environments import ENVIRONMENTS
from synthesized import Synthesized, shown, synthesize


def test_all_of_api_gateways_own_answers_are_in_the_envelope(each: Synthesized) -> None:
    known = {name for name in vars(apigateway.ResponseType) if name.isupper()}
    answers = _answers(each)
    assert {name.replace("4XX", "4_XX").replace("5XX", "5_XX") for name in answers} == known
    for name, answer in answers.items():
        error = json.loads(answer["ResponseTemplates"]["application/json"])
        assert list(error) == ["error"], name
        assert list(error["error"]) == ["message", "type", "param", "code"], name
        assert error["error"]["message"], name
        assert answer["ResponseParameters"]["gatewayresponse.header.x-request-id"] == "context.requestId", name


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("DEFAULT_4XX", None, "invalid_input"),
        ("DEFAULT_5XX", None, "internal_error"),
        ("UNAUTHORIZED", "401", "unauthenticated"),
        ("WAF_FILTERED", "403", "permission_denied"),
        ("MISSING_AUTHENTICATION_TOKEN", "404", "not_found"),
        ("REQUEST_TOO_LARGE", "413", "invalid_input"),
        ("UNSUPPORTED_MEDIA_TYPE", "415", "invalid_input"),
        ("THROTTLED", "429", "rate_limited"),
        ("QUOTA_EXCEEDED", "429", "rate_limited"),
        ("INTEGRATION_TIMEOUT", "504", "provider_unavailable"),
        ("INTEGRATION_FAILURE", "504", "provider_unavailable"),
    ],
)
def test_an_answer_has_its_status_and_the_contracts_code(
    prod: Synthesized, name: str, status: str | None, code: str
) -> None:
    answer = _answers(prod)[name]
    assert answer.get("StatusCode") == status
    assert json.loads(answer["ResponseTemplates"]["application/json"])["error"]["code"] == code


def test_who_is_throttled_is_told_when_to_come_back(prod: Synthesized) -> None:
    assert _answers(prod)["THROTTLED"]["ResponseParameters"]["gatewayresponse.header.retry-after"] == "'1'"


def test_what_is_too_large_without_an_ingress_is_told_the_limit_and_the_remedy(dev: Synthesized) -> None:
    message = json.loads(_answers(dev)["REQUEST_TOO_LARGE"]["ResponseTemplates"]["application/json"])["error"][
        "message"
    ]
    assert str(dev.environment.cut) in message
    assert "shorter" in message


def test_audio_reaches_the_function_as_bytes(each: Synthesized) -> None:
    api = each.one("ApiGateway::RestApi")
    assert api["BinaryMediaTypes"] == ["*/*"]
    assert api["EndpointConfiguration"] == {"Types": ["REGIONAL"]}


def test_the_access_log_has_the_request_id_and_neither_bodies_nor_addresses(each: Synthesized) -> None:
    stage = each.one("ApiGateway::Stage")
    line = json.loads(stage["AccessLogSetting"]["Format"])
    assert line["requestId"] == "$context.requestId"
    # A key may be pasted into a path or a query, and is sent in a header.
    forbidden = ("$context.path", "$input", "$context.requestOverride", "apiKey", "header")
    assert not [value for value in line.values() for word in forbidden if word in value]
    (setting,) = stage["MethodSettings"]
    assert (setting["LoggingLevel"], setting["DataTraceEnabled"]) == ("OFF", False)
    assert stage["TracingEnabled"] is True


def test_the_stage_throttles_as_the_environment_says(each: Synthesized) -> None:
    (setting,) = each.one("ApiGateway::Stage")["MethodSettings"]
    assert (setting["HttpMethod"], setting["ResourcePath"]) == ("*", "/*")
    assert setting["ThrottlingRateLimit"] == each.environment.api.requests_per_second
    assert setting["ThrottlingBurstLimit"] == each.environment.api.burst


def test_functions_are_arm64_with_snapshots_traces_and_the_layer(each: Synthesized) -> None:
    functions = each.properties("Lambda::Function")
    assert {function["Handler"] for function in functions} == {"api.handler.handler", "sweep.handler.handler"}
    for function in functions:
        assert function["Architectures"] == ["arm64"]
        assert function["SnapStart"] == {"ApplyOn": "PublishedVersions"}
        assert function["TracingConfig"] == {"Mode": "Active"}
        assert [shown(layer) for layer in function["Layers"]] == ["<DependenciesLayer>"]


def test_concurrency_is_reserved_where_the_environment_says_so(tmp_path: Path) -> None:
    environment = ENVIRONMENTS["dev"]
    limited = dataclasses.replace(environment, api=dataclasses.replace(environment.api, reserved_concurrency=50))
    function = synthesize(limited, tmp_path).one("Lambda::Function", name="ApiHost")
    assert function["ReservedConcurrentExecutions"] == 50


def test_every_function_is_called_by_its_alias_alone(each: Synthesized) -> None:
    functions = {name.partition("/")[2] for name, _ in each.all("Lambda::Function")}
    aliases = {name.partition("/")[2]: alias["Properties"] for name, alias in each.all("Lambda::Alias")}
    versions = {
        name.partition("/")[2]: version["Properties"]["FunctionName"]["Ref"]
        for name, version in each.all("Lambda::Version")
    }
    assert {alias["Name"] for alias in aliases.values()} == {"live"}
    assert {versions[alias["FunctionVersion"]["Fn::GetAtt"][0]] for alias in aliases.values()} == functions

    called = [
        *(permission["FunctionName"] for permission in each.properties("Lambda::Permission")),
        *(target["Arn"] for rule in each.properties("Events::Rule") for target in rule["Targets"]),
        *(method["Integration"]["Uri"] for method in each.properties("ApiGateway::Method")),
    ]
    assert len(called) >= 5
    for one in called:
        assert any(f'"{alias}"' in json.dumps(one) for alias in aliases), one
        assert not any(f'"{function}"' in json.dumps(one) for function in functions), one


def test_the_function_may_have_all_the_time_that_api_gateway_waits_and_leases_no_longer(each: Synthesized) -> None:
    function = each.one("Lambda::Function", name="ApiHost")
    assert function["Timeout"] <= 29
    assert function["Environment"]["Variables"]["VOXGATE_REQUEST_TIMEOUT"] == str(function["Timeout"])


def test_the_function_is_in_the_network_where_it_has_to_reach_the_inference_service(each: Synthesized) -> None:
    function = each.one("Lambda::Function", name="ApiHost")
    assert ("VpcConfig" in function) is (each.environment.inference is not None)
    url = shown(function["Environment"]["Variables"]["VOXGATE_INFERENCE_URL"])
    assert url == ("http://<InferenceLoadBalancer.DNSName>" if each.environment.inference else "")


def test_in_the_network_the_function_reaches_https_and_the_inference_service_alone(prod: Synthesized) -> None:
    group = prod.one("EC2::SecurityGroup", name="ApiHost")
    ports = [(rule.get("CidrIp"), rule["FromPort"], rule["ToPort"]) for rule in group["SecurityGroupEgress"]]
    assert ports == [("0.0.0.0/0", 443, 443)]
    (other,) = prod.properties("EC2::SecurityGroupEgress", name="ApiHost")
    assert "Inference" in shown(other["DestinationSecurityGroupId"])


def test_the_sweeper_comes_every_minute_and_ends_before_the_next(each: Synthesized) -> None:
    rule = each.one("Events::Rule", name="SweeperSchedule")
    assert (rule["ScheduleExpression"], rule["State"]) == ("rate(1 minute)", "ENABLED")
    assert "Input" not in rule["Targets"][0]
    assert each.one("Lambda::Function", name="SweeperHost")["Timeout"] < 60


def test_the_ledger_is_audited_every_day_and_once_more_where_that_fails(each: Synthesized) -> None:
    rule = each.one("Events::Rule", name="SweeperAudit")
    assert (rule["ScheduleExpression"], rule["State"]) == ("cron(17 3 * * ? *)", "ENABLED")
    (target,) = rule["Targets"]
    assert json.loads(target["Input"]) == {"task": "audit"}
    assert target["RetryPolicy"]["MaximumRetryAttempts"] == 2


def test_each_host_says_whose_metrics_it_reports_and_has_no_recognizer_of_its_own(each: Synthesized) -> None:
    for name in ("ApiHost", "SweeperHost"):
        variables = each.one("Lambda::Function", name=name)["Environment"]["Variables"]
        assert variables["VOXGATE_ENVIRONMENT"] == each.environment.name
        assert variables.get("VOXGATE_EMBEDDED") == ("0" if name == "ApiHost" else None)


def test_a_release_goes_to_a_tenth_first_and_is_taken_back_by_alarms_in_production(prod: Synthesized) -> None:
    group = prod.one("CodeDeploy::DeploymentGroup")
    assert group["DeploymentConfigName"] == "CodeDeployDefault.LambdaCanary10Percent5Minutes"
    assert "DEPLOYMENT_STOP_ON_ALARM" in group["AutoRollbackConfiguration"]["Events"]
    assert {shown(alarm["Name"]) for alarm in group["AlarmConfiguration"]["Alarms"]} == {
        "<ApiFunctionFails>",
        "<ApiManyServerErrors>",
    }
    shifted = [alias for _, alias in prod.all("Lambda::Alias") if "UpdatePolicy" in alias]
    assert len(shifted) == 1


def _answers(synthesized: Synthesized) -> dict[str, Any]:
    return {answer["ResponseType"]: answer for answer in synthesized.properties("ApiGateway::GatewayResponse")}
