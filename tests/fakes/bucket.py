"""An S3 in this process, and buckets in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import boto3
import pytest
from moto import mock_aws

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REGION: Literal["eu-central-1"] = "eu-central-1"


@contextmanager
def s3() -> Iterator[S3Client]:
    """One for all tests of a module, since a session's first client takes a tenth of a second to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        with mock_aws():
            client = boto3.client("s3")
            yield client
            client.close()


@contextmanager
def bucket(client: S3Client, name: str) -> Iterator[None]:
    """A new one, and nothing is left of it."""
    client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    yield
    for found in client.list_objects_v2(Bucket=name).get("Contents", []):
        client.delete_object(Bucket=name, Key=found["Key"])
    client.delete_bucket(Bucket=name)
