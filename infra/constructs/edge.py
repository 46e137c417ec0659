"""CloudFront: the one hostname that customers call, before both origins."""

from __future__ import annotations

import json
from pathlib import Path

from aws_cdk import CfnOutput, Duration, SecretValue
from aws_cdk import aws_certificatemanager as acm
from aws_cdk import aws_cloudfront as cloudfront
from aws_cdk import aws_cloudfront_origins as origins
from aws_cdk import aws_route53 as route53
from aws_cdk import aws_route53_targets as targets
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra.constructs.api import Api
from infra.constructs.data import Data
from infra.constructs.firewall import ORIGIN_HEADER, OriginGuard
from infra.constructs.ingress import Ingress
from infra.constructs.rules import acknowledge
from infra.environments import Domain, Environment
from voxgate.multipart import Limits

_ROUTE = Path(__file__).parents[1] / "edge" / "route.js"
_INGRESS = "ingress"  # the origin's id, by which the function names it
_LIVE = "/v1/stt/stream"


class Edge(Construct):
    """`url` is what customers call. `certificate` and `web_acl` are made in us-east-1."""

    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        environment: Environment,
        data: Data,
        api: Api,
        ingress: Ingress | None,
        certificate: acm.ICertificate | None,
        web_acl: str,
    ) -> None:
        """`web_acl` is an ARN."""
        super().__init__(scope, id)
        # As a reference, which CloudFormation resolves when it deploys: the template has no value.
        said = SecretValue.secrets_manager(
            self._origin_secret(data).secret_arn, version_id=environment.origin_secret_version
        ).unsafe_unwrap()
        OriginGuard(self, "OriginGuard", rest_api=api.rest_api, said=said)
        self._headers = _security_headers(self)
        small = origins.RestApiOrigin(
            api.rest_api,
            origin_id="api",
            custom_headers={ORIGIN_HEADER: said},
            read_timeout=Duration.seconds(environment.api.timeout_seconds + 1),
        )
        domain = environment.domain
        self.distribution = cloudfront.Distribution(
            self,
            "Distribution",
            comment=f"Voxgate {environment.name}",
            default_behavior=self._behavior(small, self._route(environment)),
            additional_behaviors={_LIVE: self._behavior(_streaming(ingress))} if ingress else None,
            http_version=cloudfront.HttpVersion.HTTP2_AND_3,
            domain_names=[domain.name] if domain else None,
            certificate=certificate,
            minimum_protocol_version=cloudfront.SecurityPolicyProtocol.TLS_V1_2_2021 if domain else None,
            price_class=cloudfront.PriceClass.PRICE_CLASS_100,
            web_acl_id=web_acl,
        )
        self._explain(domain)
        self.url = f"https://{domain.name if domain else self.distribution.distribution_domain_name}"
        if domain:
            self._records(domain)
        CfnOutput(self, "BaseUrl", value=self.url, description="What customers call")

    def _origin_secret(self, data: Data) -> secretsmanager.Secret:
        secret = secretsmanager.Secret(
            self,
            "OriginSecret",
            description="What CloudFront says to the REST API to be let in",
            encryption_key=data.key,
            generate_secret_string=secretsmanager.SecretStringGenerator(exclude_punctuation=True, password_length=48),
        )
        acknowledge(
            secret,
            "SMG4",
            "CloudFront and the origin's web ACL take it when they are deployed, so it changes with a deployment: a "
            "rotation on its own would part the two. What it opens is an API that still asks for a customer's key.",
        )
        return secret

    def _behavior(
        self, origin: cloudfront.IOrigin, function: cloudfront.IFunction | None = None
    ) -> cloudfront.BehaviorOptions:
        event = cloudfront.FunctionEventType.VIEWER_REQUEST
        return cloudfront.BehaviorOptions(
            origin=origin,
            allowed_methods=cloudfront.AllowedMethods.ALLOW_ALL,
            # A redirect comes after the key went over the wire in clear.
            viewer_protocol_policy=cloudfront.ViewerProtocolPolicy.HTTPS_ONLY,
            cache_policy=cloudfront.CachePolicy.CACHING_DISABLED,
            # API Gateway takes a request by its own host name only.
            origin_request_policy=cloudfront.OriginRequestPolicy.ALL_VIEWER_EXCEPT_HOST_HEADER,
            response_headers_policy=self._headers,
            function_associations=[cloudfront.FunctionAssociation(event_type=event, function=function)]
            if function
            else None,
        )

    def _route(self, environment: Environment) -> cloudfront.Function:
        code = _ROUTE.read_text(encoding="utf-8")
        for token, value in {
            "__CUT__": environment.cut,
            "__LARGEST__": Limits().body,
            "__INGRESS__": _INGRESS if environment.ingress else "",
        }.items():
            code = code.replace(token, json.dumps(value))
        return cloudfront.Function(
            self,
            "Route",
            comment="Which origin takes an upload, by its length",
            runtime=cloudfront.FunctionRuntime.JS_2_0,
            code=cloudfront.FunctionCode.from_inline(code),
        )

    def _records(self, domain: Domain) -> None:
        zone = route53.HostedZone.from_hosted_zone_attributes(
            self, "Zone", hosted_zone_id=domain.zone_id, zone_name=domain.zone_name
        )
        target = route53.RecordTarget.from_alias(targets.CloudFrontTarget(self.distribution))
        for record in (route53.ARecord, route53.AaaaRecord):
            record(self, record.__name__, zone=zone, record_name=domain.name, target=target)

    def _explain(self, domain: Domain | None) -> None:
        acknowledge(self.distribution, "CFR1", "Customers may call from anywhere; the firewall limits each address.")
        acknowledge(
            self.distribution,
            "CFR3",
            "CloudFront's log would have addresses with their queries, into which some paste their keys. Each request "
            "has its line, with its id, in the access log of the origin that took it; what the firewall blocked is in "
            "the firewall's log, and what was refused for its length in CloudFront's metrics.",
        )
        if domain is None:
            acknowledge(
                self.distribution,
                "CFR4",
                "Without a domain of its own the distribution has CloudFront's certificate, whose TLS policy cannot be "
                "set; production has a domain.",
            )


def _streaming(ingress: Ingress) -> cloudfront.IOrigin:
    return origins.VpcOrigin.with_application_load_balancer(
        ingress.load_balancer,
        origin_id=_INGRESS,
        # Plain within the VPC: a public certificate cannot be had for a name that is not public.
        http_port=80,
        protocol_policy=cloudfront.OriginProtocolPolicy.HTTP_ONLY,
        # The most that CloudFront waits for the next byte, unless AWS raises the account's quota.
        read_timeout=Duration.seconds(120),
        keepalive_timeout=Duration.seconds(60),
    )


def _security_headers(scope: Construct) -> cloudfront.ResponseHeadersPolicy:
    return cloudfront.ResponseHeadersPolicy(
        scope,
        "SecurityHeaders",
        comment="An API has nothing to show: no frames, no scripts, no guessing of types",
        security_headers_behavior=cloudfront.ResponseSecurityHeadersBehavior(
            strict_transport_security=cloudfront.ResponseHeadersStrictTransportSecurity(
                access_control_max_age=Duration.days(365), include_subdomains=True, override=True
            ),
            content_type_options=cloudfront.ResponseHeadersContentTypeOptions(override=True),
            frame_options=cloudfront.ResponseHeadersFrameOptions(
                frame_option=cloudfront.HeadersFrameOption.DENY, override=True
            ),
            referrer_policy=cloudfront.ResponseHeadersReferrerPolicy(
                referrer_policy=cloudfront.HeadersReferrerPolicy.NO_REFERRER, override=True
            ),
            content_security_policy=cloudfront.ResponseHeadersContentSecurityPolicy(
                content_security_policy="default-src 'none'; frame-ancestors 'none'", override=True
            ),
        ),
    )
