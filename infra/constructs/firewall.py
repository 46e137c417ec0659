"""Web ACLs: before CloudFront against the internet, and before the REST API against all but CloudFront."""

from __future__ import annotations

import json

from aws_cdk import ArnFormat, Stack
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_logs as logs
from aws_cdk import aws_secretsmanager as secretsmanager
from aws_cdk import aws_wafv2 as wafv2
from constructs import Construct

from infra.constructs.container import log_group
from infra.environments import Environment
from voxgate import errors

ORIGIN_HEADER = "x-voxgate-origin"
# Rules that read the body, of which they would see the first 16 KiB of audio and find anything in it, and
# one that refuses programs that do not say who they are, as curl in a script may. They count.
_COUNTED = {
    "AWSManagedRulesCommonRuleSet": (
        "SizeRestrictions_BODY",
        "EC2MetaDataSSRF_BODY",
        "GenericLFI_BODY",
        "GenericRFI_BODY",
        "CrossSiteScripting_BODY",
        "NoUserAgent_HEADER",
    ),
    "AWSManagedRulesKnownBadInputsRuleSet": ("JavaDeserializationRCE_BODY", "Log4JRCE_BODY", "ReactJSRCE_BODY"),
    "AWSManagedRulesAmazonIpReputationList": (),
}
_ACL = wafv2.CfnWebACL


class Firewall(Construct):
    """In us-east-1, where CloudFront wants it. `web_acl` is its CfnWebACL."""

    def __init__(self, scope: Construct, id: str, *, environment: Environment) -> None:  # noqa: A002
        super().__init__(scope, id)
        busy = errors.RateLimited("Too many requests from this address; ask again in five minutes.", wait=300)
        self.web_acl = _ACL(
            self,
            "WebAcl",
            scope="CLOUDFRONT",
            default_action=_ACL.DefaultActionProperty(allow={}),
            visibility_config=_visible("Firewall"),
            custom_response_bodies={"busy": _body(busy)},
            # Neither the log nor the samples in the console show a customer's key.
            data_protection_config=_ACL.DataProtectionConfigProperty(
                data_protections=[
                    *(_hidden("SINGLE_HEADER", name) for name in ("authorization", "x-api-key")),
                    _hidden("QUERY_STRING"),
                ]
            ),
            rules=[self._rate(environment, busy), *self._managed()],
        )
        log = log_group(self, "Log", environment=environment)
        resource = log.node.default_child
        assert isinstance(resource, logs.CfnLogGroup)
        resource.log_group_name = f"aws-waf-logs-voxgate-{environment.name}"  # WAF writes to no other kind of name
        wafv2.CfnLoggingConfiguration(
            self,
            "Logging",
            resource_arn=self.web_acl.attr_arn,
            log_destination_configs=[
                Stack.of(self).format_arn(
                    service="logs",
                    resource="log-group",
                    resource_name=resource.log_group_name,
                    arn_format=ArnFormat.COLON_RESOURCE_NAME,
                )
            ],
            logging_filter={
                "DefaultBehavior": "DROP",
                "Filters": [
                    {
                        "Behavior": "KEEP",
                        "Requirement": "MEETS_ANY",
                        "Conditions": [{"ActionCondition": {"Action": action}} for action in ("BLOCK", "COUNT")],
                    }
                ],
            },
        ).node.add_dependency(log)

    def _rate(self, environment: Environment, busy: errors.RateLimited) -> wafv2.CfnWebACL.RuleProperty:
        return _ACL.RuleProperty(
            name="Rate",
            priority=0,
            action=_ACL.RuleActionProperty(
                block=_ACL.BlockActionProperty(
                    custom_response=_ACL.CustomResponseProperty(
                        response_code=busy.status,
                        custom_response_body_key="busy",
                        response_headers=[
                            _ACL.CustomHTTPHeaderProperty(name=name, value=value)
                            for name, value in busy.headers.items()
                        ],
                    )
                )
            ),
            statement=_ACL.StatementProperty(
                rate_based_statement=_ACL.RateBasedStatementProperty(
                    aggregate_key_type="IP", limit=environment.requests_per_address, evaluation_window_sec=300
                )
            ),
            visibility_config=_visible("Rate"),
        )

    def _managed(self) -> list[wafv2.CfnWebACL.RuleProperty]:
        return [
            _ACL.RuleProperty(
                name=name,
                priority=priority,
                override_action=_ACL.OverrideActionProperty(none={}),
                statement=_ACL.StatementProperty(
                    managed_rule_group_statement=_ACL.ManagedRuleGroupStatementProperty(
                        vendor_name="AWS",
                        name=name,
                        rule_action_overrides=[
                            _ACL.RuleActionOverrideProperty(
                                name=rule, action_to_use=_ACL.RuleActionProperty(count=_ACL.CountActionProperty())
                            )
                            for rule in counted
                        ],
                    )
                ),
                visibility_config=_visible(name),
            )
            for priority, (name, counted) in enumerate(_COUNTED.items(), start=1)
        ]


class OriginGuard(Construct):
    """Lets through to the REST API only what carries the header that CloudFront adds: whoever finds the
    API's own address would go round the firewall and its rate."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        rest_api: apigateway.RestApi,
        secret: secretsmanager.ISecret,
    ) -> None:
        super().__init__(scope, id)
        acl = _ACL(
            self,
            "WebAcl",
            scope="REGIONAL",
            default_action=_ACL.DefaultActionProperty(block={}),  # said by the API's answer for WAF_FILTERED
            visibility_config=_visible("OriginGuard"),
            data_protection_config=_ACL.DataProtectionConfigProperty(
                data_protections=[
                    *(_hidden("SINGLE_HEADER", name) for name in ("authorization", "x-api-key", ORIGIN_HEADER)),
                    _hidden("QUERY_STRING"),
                ]
            ),
            rules=[
                _ACL.RuleProperty(
                    name="FromCloudFront",
                    priority=0,
                    action=_ACL.RuleActionProperty(allow={}),
                    statement=_ACL.StatementProperty(
                        byte_match_statement=_ACL.ByteMatchStatementProperty(
                            field_to_match=_ACL.FieldToMatchProperty(single_header={"Name": ORIGIN_HEADER}),
                            positional_constraint="EXACTLY",
                            search_string=secret.secret_value.unsafe_unwrap(),  # as a reference, not the value
                            text_transformations=[_ACL.TextTransformationProperty(priority=0, type="NONE")],
                        )
                    ),
                    visibility_config=_visible("FromCloudFront"),
                )
            ],
        )
        wafv2.CfnWebACLAssociation(
            self, "Association", resource_arn=rest_api.deployment_stage.stage_arn, web_acl_arn=acl.attr_arn
        )


def _visible(name: str) -> wafv2.CfnWebACL.VisibilityConfigProperty:
    return _ACL.VisibilityConfigProperty(
        cloud_watch_metrics_enabled=True, metric_name=name, sampled_requests_enabled=True
    )


def _hidden(kind: str, name: str | None = None) -> wafv2.CfnWebACL.DataProtectProperty:
    return _ACL.DataProtectProperty(
        action="SUBSTITUTION",
        field=_ACL.FieldToProtectProperty(field_type=kind, field_keys=None if name is None else [name]),
    )


def _body(error: errors.VoxgateError) -> wafv2.CfnWebACL.CustomResponseBodyProperty:
    return _ACL.CustomResponseBodyProperty(content=json.dumps(error.envelope()), content_type="APPLICATION_JSON")
