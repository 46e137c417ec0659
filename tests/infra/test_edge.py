from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from infra.environments import ENVIRONMENTS, InvalidEnvironment
from synthesized import Synthesized, shown, synthesize
from voxgate.multipart import Limits

CACHING_DISABLED = "4135ea2d-6df8-44a3-9df3-4b5a84be39ad"
ALL_BUT_HOST = "b689b0a8-53d0-40ab-baf2-68738e2966ac"


def test_no_path_is_cached_or_served_without_tls_or_security_headers(each: Synthesized) -> None:
    for behavior in _behaviors(each).values():
        assert behavior["CachePolicyId"] == CACHING_DISABLED
        assert behavior["OriginRequestPolicyId"] == ALL_BUT_HOST
        assert behavior["ViewerProtocolPolicy"] == "https-only"
        assert shown(behavior["ResponseHeadersPolicyId"]) == "<EdgeSecurityHeaders>"
        assert {"POST", "DELETE", "OPTIONS"} <= set(behavior["AllowedMethods"])


def test_the_default_goes_by_the_function_and_the_live_socket_straight_to_the_ingress(each: Synthesized) -> None:
    behaviors = _behaviors(each)
    default = behaviors.pop("*")
    assert default["TargetOriginId"] == "api"
    (association,) = default["FunctionAssociations"]
    assert association["EventType"] == "viewer-request"
    assert shown(association["FunctionARN"]) == "<EdgeRoute.FunctionARN>"
    if each.environment.ingress is None:
        assert not behaviors
        return
    assert list(behaviors) == ["/v1/stt/stream"]
    live = behaviors["/v1/stt/stream"]
    assert live["TargetOriginId"] == "ingress"
    assert "FunctionAssociations" not in live


def test_the_function_has_the_environments_cut_the_forms_limit_and_the_ingress(each: Synthesized) -> None:
    function = each.one("CloudFront::Function")
    code = function["FunctionCode"]
    assert f"const CUT = {each.environment.cut};" in code
    assert f"const LARGEST = {Limits().body};" in code
    assert f'const INGRESS = "{"ingress" if each.environment.ingress else ""}";' in code
    assert "__" not in code
    assert function["FunctionConfig"]["Runtime"] == "cloudfront-js-2.0"
    assert len(code.encode()) < 10_240


def test_the_ingress_is_reached_within_the_vpc_and_may_be_silent_for_two_minutes(prod: Synthesized) -> None:
    origin = _origins(prod)["ingress"]
    assert shown(origin["VpcOriginConfig"]["VpcOriginId"]).startswith("<EdgeDistribution")
    assert origin["VpcOriginConfig"]["OriginReadTimeout"] == 120
    (endpoint,) = prod.properties("CloudFront::VpcOrigin")
    assert shown(endpoint["VpcOriginEndpointConfig"]["Arn"]) == "<IngressLoadBalancer>"


def test_cloudfront_speaks_http3_behind_the_firewall(each: Synthesized) -> None:
    config = each.one("CloudFront::Distribution")["DistributionConfig"]
    assert config["HttpVersion"] == "http2and3"
    assert config["IPV6Enabled"] is True
    output = config["WebACLId"]["Fn::GetStackOutput"]
    assert output["StackName"] == f"Voxgate-{each.environment.name}-Front"
    assert output["Region"] == "us-east-1"
    value = each.templates["Front"]["Outputs"][output["OutputName"]]["Value"]
    assert shown(value) == "<FirewallWebAcl.Arn>"


def test_a_domain_has_its_certificate_its_records_and_modern_tls_alone(prod: Synthesized) -> None:
    config = prod.one("CloudFront::Distribution")["DistributionConfig"]
    assert prod.environment.domain is not None
    assert config["Aliases"] == [prod.environment.domain.name]
    assert config["ViewerCertificate"]["MinimumProtocolVersion"] == "TLSv1.2_2021"
    certificate = prod.one("CertificateManager::Certificate")
    assert certificate["DomainName"] == prod.environment.domain.name
    records = prod.properties("Route53::RecordSet")
    assert {(record["Type"], record["Name"]) for record in records} == {
        ("A", "api.example.com."),
        ("AAAA", "api.example.com."),
    }


def test_without_a_domain_there_is_cloudfronts_own_name(dev: Synthesized) -> None:
    assert "Aliases" not in dev.one("CloudFront::Distribution")["DistributionConfig"]
    assert not [*dev.all("CertificateManager::Certificate")]
    assert _base_url(dev) == "https://<EdgeDistribution.DomainName>"


def test_the_rest_api_lets_in_nobody_but_cloudfront(each: Synthesized) -> None:
    acl = each.one("WAFv2::WebACL", name="Service/EdgeOriginGuard")
    assert (acl["Scope"], acl["DefaultAction"]) == ("REGIONAL", {"Block": {}})
    (rule,) = acl["Rules"]
    match = rule["Statement"]["ByteMatchStatement"]
    (header,) = _origins(each)["api"]["OriginCustomHeaders"]
    assert match["FieldToMatch"] == {"SingleHeader": {"Name": header["HeaderName"]}}
    assert match["PositionalConstraint"] == "EXACTLY"
    assert match["SearchString"] == header["HeaderValue"]
    assert shown(header["HeaderValue"]) == "{{resolve:secretsmanager:<EdgeOriginSecret>:SecretString:::}}"
    (association,) = each.properties("WAFv2::WebACLAssociation")
    assert shown(association["ResourceArn"]).endswith("/restapis/<ApiRestApi>/stages/<ApiRestApiDeploymentStagelive>")


def test_another_version_of_the_origins_secret_changes_the_templates_at_both_ends(tmp_path: Path) -> None:
    """CloudFormation resolves a reference again only where the template's text is another one."""
    version = "01234567-89ab-cdef-0123-456789abcdef"
    rotated = synthesize(dataclasses.replace(ENVIRONMENTS["dev"], origin_secret_version=version), tmp_path)
    (header,) = _origins(rotated)["api"]["OriginCustomHeaders"]
    (rule,) = rotated.one("WAFv2::WebACL", name="Service/EdgeOriginGuard")["Rules"]
    assert shown(header["HeaderValue"]).endswith(f":SecretString:::{version}}}}}")
    assert rule["Statement"]["ByteMatchStatement"]["SearchString"] == header["HeaderValue"]
    with pytest.raises(InvalidEnvironment, match="origin_secret_version"):
        dataclasses.replace(ENVIRONMENTS["dev"], origin_secret_version="the-new-one")


def test_the_firewall_judges_no_body(each: Synthesized) -> None:
    groups = [
        rule["Statement"]["ManagedRuleGroupStatement"]
        for rule in _firewall(each)["Rules"]
        if "ManagedRuleGroupStatement" in rule["Statement"]
    ]
    counted = {
        override["Name"]
        for group in groups
        for override in group["RuleActionOverrides"]
        if override["ActionToUse"] == {"Count": {}}
    }
    # https://docs.aws.amazon.com/waf/latest/developerguide/aws-managed-rule-groups-baseline.html
    assert {
        "SizeRestrictions_BODY",
        "EC2MetaDataSSRF_BODY",
        "GenericLFI_BODY",
        "GenericRFI_BODY",
        "CrossSiteScripting_BODY",
        "JavaDeserializationRCE_BODY",
        "Log4JRCE_BODY",
        "ReactJSRCE_BODY",
    } <= counted


def test_what_the_groups_find_they_only_count_and_a_rule_of_ours_refuses_in_the_envelope(each: Synthesized) -> None:
    acl = _firewall(each)
    rules = {rule["Name"]: rule for rule in acl["Rules"]}
    found = rules.pop("Found")
    assert found["Priority"] > max(rule["Priority"] for rule in rules.values()), "after those whose labels it goes by"
    labels = [one["LabelMatchStatement"] for one in found["Statement"]["OrStatement"]["Statements"]]
    assert {label["Scope"] for label in labels} == {"LABEL"}
    counting = {
        override["Name"]
        for rule in rules.values()
        for override in rule["Statement"].get("ManagedRuleGroupStatement", {}).get("RuleActionOverrides", [])
        if override["ActionToUse"] == {"Count": {}}
    }
    refused = {label["Key"].rsplit(":", 1)[-1].lower() for label in labels}
    # As AWS names them: rule and label differ in their letters' case, and in this one's first word.
    renamed = {"UserAgent_BadBots_HEADER": "badbots_header"}
    blocked = {name for name in counting if renamed.get(name, name.lower()) in refused}
    assert len(blocked) == len(labels) == 27
    assert counting - blocked == {name for name in counting if name.endswith("_BODY")} | {"NoUserAgent_HEADER"}
    namespaces = {label["Key"].rsplit(":", 1)[0] for label in labels}
    groups = ("core-rule-set", "known-bad-inputs", "amazon-ip-list")
    assert namespaces == {f"awswaf:managed:aws:{group}" for group in groups}
    response = found["Action"]["Block"]["CustomResponse"]
    assert response["ResponseCode"] == 403
    body = acl["CustomResponseBodies"][response["CustomResponseBodyKey"]]
    error = json.loads(body["Content"])["error"]
    assert (list(error), error["code"]) == (["message", "type", "param", "code"], "permission_denied")
    assert body["ContentType"] == "APPLICATION_JSON"


def test_an_address_that_asks_too_often_is_told_so_in_the_envelope(each: Synthesized) -> None:
    acl = _firewall(each)
    (rate,) = [rule for rule in acl["Rules"] if "RateBasedStatement" in rule["Statement"]]
    statement = rate["Statement"]["RateBasedStatement"]
    assert (statement["AggregateKeyType"], statement["EvaluationWindowSec"]) == ("IP", 300)
    assert statement["Limit"] == each.environment.requests_per_address
    response = rate["Action"]["Block"]["CustomResponse"]
    assert response["ResponseCode"] == 429
    assert {"Name": "retry-after", "Value": "300"} in response["ResponseHeaders"]
    body = acl["CustomResponseBodies"][response["CustomResponseBodyKey"]]
    assert json.loads(body["Content"])["error"]["code"] == "rate_limited"
    assert body["ContentType"] == "APPLICATION_JSON"


@pytest.mark.parametrize("name", ["Front/Firewall", "Service/EdgeOriginGuard"])
def test_what_the_firewalls_keep_shows_no_key(each: Synthesized, name: str) -> None:
    hidden = each.one("WAFv2::WebACL", name=name)["DataProtectionConfig"]["DataProtections"]
    fields = {key for one in hidden for key in one["Field"].get("FieldKeys", [one["Field"]["FieldType"]])}
    assert {"authorization", "x-api-key", "QUERY_STRING"} <= fields


def test_what_the_firewall_blocks_is_in_a_log(each: Synthesized) -> None:
    logging = each.one("WAFv2::LoggingConfiguration")
    name = each.one("Logs::LogGroup", name="Front/Firewall")["LogGroupName"]
    assert shown(logging["LogDestinationConfigs"][0]).endswith(f":log-group:{name}")
    assert name.startswith("aws-waf-logs-")


def _behaviors(synthesized: Synthesized) -> dict[str, Any]:
    config = synthesized.one("CloudFront::Distribution")["DistributionConfig"]
    return {"*": config["DefaultCacheBehavior"]} | {one["PathPattern"]: one for one in config.get("CacheBehaviors", ())}


def _origins(synthesized: Synthesized) -> dict[str, Any]:
    origins = synthesized.one("CloudFront::Distribution")["DistributionConfig"]["Origins"]
    return {origin["Id"]: origin for origin in origins}


def _firewall(synthesized: Synthesized) -> Any:
    return synthesized.one("WAFv2::WebACL", name="Front/Firewall")


def _base_url(synthesized: Synthesized) -> str:
    outputs = synthesized.templates["Service"]["Outputs"]
    (url,) = [shown(output["Value"]) for name, output in outputs.items() if name.startswith("EdgeBaseUrl")]
    return url
