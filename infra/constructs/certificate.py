"""The TLS certificate of the hostname that customers call."""

from __future__ import annotations

from aws_cdk import aws_certificatemanager as acm
from aws_cdk import aws_route53 as route53
from constructs import Construct

from infra.environments import Domain


class Certificate(Construct):
    """In us-east-1, where CloudFront wants it; proven, and so renewed, by a record in the domain's zone."""

    def __init__(self, scope: Construct, id: str, *, domain: Domain) -> None:  # noqa: A002
        super().__init__(scope, id)
        zone = route53.HostedZone.from_hosted_zone_attributes(
            self, "Zone", hosted_zone_id=domain.zone_id, zone_name=domain.zone_name
        )
        self.certificate = acm.Certificate(
            self, "Certificate", domain_name=domain.name, validation=acm.CertificateValidation.from_dns(zone)
        )
