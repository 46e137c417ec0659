"""Web ACLs: before CloudFront against the internet, and before the REST API against all but CloudFront."""

from __future__ import annotations

import json

from aws_cdk import ArnFormat, Stack
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_logs as logs
from aws_cdk import aws_wafv2 as wafv2
from constructs import Construct

from infra.constructs.container import log_group
from infra.environments import Environment
from voxgate import errors

ORIGIN_HEADER = "x-voxgate-origin"
# AWS's groups, by their rules and the last part of each one's label, which no rule gives away by its name:
# https://docs.aws.amazon.com/waf/latest/developerguide/aws-managed-rule-groups-baseline.html and ...-ip-rep.html.
# All of them are made to count, so that what they find is refused by a rule of ours, in our envelope. One that
# AWS adds later is not named here, and blocks with CloudFront's own page until it is.
_BLOCKED = {
    "AWSManagedRulesCommonRuleSet": {
        "UserAgent_BadBots_HEADER": "core-rule-set:BadBots_Header",
        "SizeRestrictions_QUERYSTRING": "core-rule-set:SizeRestrictions_QueryString",
        "SizeRestrictions_Cookie_HEADER": "core-rule-set:SizeRestrictions_Cookie_Header",
        "SizeRestrictions_URIPATH": "core-rule-set:SizeRestrictions_URIPath",
        "EC2MetaDataSSRF_COOKIE": "core-rule-set:EC2MetaDataSSRF_Cookie",
        "EC2MetaDataSSRF_URIPATH": "core-rule-set:EC2MetaDataSSRF_URIPath",
        "EC2MetaDataSSRF_QUERYARGUMENTS": "core-rule-set:EC2MetaDataSSRF_QueryArguments",
        "GenericLFI_QUERYARGUMENTS": "core-rule-set:GenericLFI_QueryArguments",
        "GenericLFI_URIPATH": "core-rule-set:GenericLFI_URIPath",
        "RestrictedExtensions_URIPATH": "core-rule-set:RestrictedExtensions_URIPath",
        "RestrictedExtensions_QUERYARGUMENTS": "core-rule-set:RestrictedExtensions_QueryArguments",
        "GenericRFI_QUERYARGUMENTS": "core-rule-set:GenericRFI_QueryArguments",
        "GenericRFI_URIPATH": "core-rule-set:GenericRFI_URIPath",
        "CrossSiteScripting_COOKIE": "core-rule-set:CrossSiteScripting_Cookie",
        "CrossSiteScripting_QUERYARGUMENTS": "core-rule-set:CrossSiteScripting_QueryArguments",
        "CrossSiteScripting_URIPATH": "core-rule-set:CrossSiteScripting_URIPath",
    },
    "AWSManagedRulesKnownBadInputsRuleSet": {
        "JavaDeserializationRCE_HEADER": "known-bad-inputs:JavaDeserializationRCE_Header",
        "JavaDeserializationRCE_URIPATH": "known-bad-inputs:JavaDeserializationRCE_URIPath",
        "JavaDeserializationRCE_QUERYSTRING": "known-bad-inputs:JavaDeserializationRCE_QueryString",
        "Host_localhost_HEADER": "known-bad-inputs:Host_Localhost_Header",
        "PROPFIND_METHOD": "known-bad-inputs:Propfind_Method",
        "ExploitablePaths_URIPATH": "known-bad-inputs:ExploitablePaths_URIPath",
        "Log4JRCE_HEADER": "known-bad-inputs:Log4JRCE_Header",
        "Log4JRCE_QUERYSTRING": "known-bad-inputs:Log4JRCE_QueryString",
        "Log4JRCE_URIPATH": "known-bad-inputs:Log4JRCE_URIPath",
    },
    "AWSManagedRulesAmazonIpReputationList": {
        "AWSManagedIPReputationList": "amazon-ip-list:AWSManagedIPReputationList",
        "AWSManagedReconnaissanceList": "amazon-ip-list:AWSManagedReconnaissanceList",
    },
}
# Rules that read the body, of which they would see the first 16 KiB of audio and find anything in it, and
# one that refuses programs that do not say who they are, as curl in a script may. They count, and that is all.
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

_SECRET = ("authorization", "x-api-key", "sec-websocket-protocol")  # a browser has no other place for a key


class Firewall(Construct):
    """In us-east-1, where CloudFront wants it. `web_acl` is its CfnWebACL."""

    def __init__(self, scope: Construct, id: str, *, environment: Environment) -> None:  # noqa: A002
        super().__init__(scope, id)
        busy = errors.RateLimited("Too many requests from this address; ask again in five minutes.", wait=300)
        suspect = errors.Forbidden(
            "The firewall takes this request for an attack, by its address, path, query or headers.",
            code="permission_denied",
        )
        self.web_acl = _ACL(
            self,
            "WebAcl",
            scope="CLOUDFRONT",
            default_action=_ACL.DefaultActionProperty(allow={}),
            visibility_config=_visible("Firewall"),
            custom_response_bodies={"busy": _body(busy), "suspect": _body(suspect)},
            # Neither the log nor the samples in the console show a customer's key.
            data_protection_config=_ACL.DataProtectionConfigProperty(
                data_protections=[
                    *(_hidden("SINGLE_HEADER", name) for name in _SECRET),
                    _hidden("QUERY_STRING"),
                ]
            ),
            rules=[self._rate(environment, busy), *self._managed(), self._found(suspect)],
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
            action=_refusing(busy, "busy"),
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
                            for rule in (*counted, *_BLOCKED[name])
                        ],
                    )
                ),
                visibility_config=_visible(name),
            )
            for priority, (name, counted) in enumerate(_COUNTED.items(), start=1)
        ]

    def _found(self, suspect: errors.Forbidden) -> wafv2.CfnWebACL.RuleProperty:
        """After the groups, whose labels it goes by."""
        return _ACL.RuleProperty(
            name="Found",
            priority=1 + len(_BLOCKED),
            action=_refusing(suspect, "suspect"),
            statement=_ACL.StatementProperty(
                or_statement=_ACL.OrStatementProperty(
                    statements=[
                        _ACL.StatementProperty(
                            label_match_statement=_ACL.LabelMatchStatementProperty(
                                scope="LABEL", key=f"awswaf:managed:aws:{label}"
                            )
                        )
                        for labels in _BLOCKED.values()
                        for label in labels.values()
                    ]
                )
            ),
            visibility_config=_visible("Found"),
        )


class OriginGuard(Construct):
    """Lets through to the REST API only what carries the header that CloudFront adds: whoever finds the
    API's own address would go round the firewall and its rate."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        rest_api: apigateway.RestApi,
        said: str,
    ) -> None:
        """`said` is what the header has: a reference to it, not the value."""
        super().__init__(scope, id)
        acl = _ACL(
            self,
            "WebAcl",
            scope="REGIONAL",
            default_action=_ACL.DefaultActionProperty(block={}),  # said by the API's answer for WAF_FILTERED
            visibility_config=_visible("OriginGuard"),
            data_protection_config=_ACL.DataProtectionConfigProperty(
                data_protections=[
                    *(_hidden("SINGLE_HEADER", name) for name in (*_SECRET, ORIGIN_HEADER)),
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
                            search_string=said,
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


def _refusing(error: errors.VoxgateError, body: str) -> wafv2.CfnWebACL.RuleActionProperty:
    response = _ACL.CustomResponseProperty(
        response_code=error.status,
        custom_response_body_key=body,
        response_headers=[
            _ACL.CustomHTTPHeaderProperty(name=name, value=value) for name, value in error.headers.items()
        ]
        or None,
    )
    return _ACL.RuleActionProperty(block=_ACL.BlockActionProperty(custom_response=response))


def _hidden(kind: str, name: str | None = None) -> wafv2.CfnWebACL.DataProtectProperty:
    return _ACL.DataProtectProperty(
        action="SUBSTITUTION",
        field=_ACL.FieldToProtectProperty(field_type=kind, field_keys=None if name is None else [name]),
    )


def _body(error: errors.VoxgateError) -> wafv2.CfnWebACL.CustomResponseBodyProperty:
    return _ACL.CustomResponseBodyProperty(content=json.dumps(error.envelope()), content_type="APPLICATION_JSON")
