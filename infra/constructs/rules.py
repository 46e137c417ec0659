"""Findings of the rules engine (cdk-nag, AwsSolutions) that stand, each with its reason beside the construct."""

from __future__ import annotations

from aws_cdk import Acknowledgment, Validations
from constructs import IConstruct


def acknowledge(construct: IConstruct, rule: str, reason: str, *findings: str) -> None:
    """`rule` without its pack, as `IAM5`; of one that reports several, `findings` are those that stand."""
    ids = [f"AwsSolutions-{rule}[{finding}]" for finding in findings] or [f"AwsSolutions-{rule}"]
    Validations.of(construct).acknowledge(*(Acknowledgment(id=one, reason=reason) for one in ids))
