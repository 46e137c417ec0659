"""Staging in an S3 bucket, whose lifecycle rules remove what a dead request leaves behind."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Literal, Required, TypedDict

from voxgate.staging import PresignedUpload, audio_key, checked
from voxgate.tasks import Threads

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PIECE = 1024 * 1024


class _Encryption(TypedDict, total=False):
    ServerSideEncryption: Required[Literal["AES256", "aws:kms"]]
    SSEKMSKeyId: str


class S3Staging:
    """Implements `Staging`, `References` and `Presigner`. `prefix` goes before each key as it is.

    Needs `s3:ListBucket`: without it S3 says 403, not 404, of an object that is not there.
    """

    def __init__(self, bucket: str, *, prefix: str = "", client: S3Client | None = None, kms_key_id: str = "") -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._own_client = client is None
        self._client = client or _client()
        self._encryption: _Encryption = {"ServerSideEncryption": "AES256"}
        if kms_key_id:
            self._encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key_id}
        self._threads = Threads("staging", 8)

    async def put(self, key: str, content: BinaryIO | bytes, *, content_type: str = "application/octet-stream") -> str:
        name = self._prefix + checked(key)
        body = io.BytesIO(content) if isinstance(content, bytes) else content

        def work() -> None:
            body.seek(0)  # botocore sends from where the file stands
            self._client.put_object(
                Bucket=self._bucket, Key=name, Body=body, ContentType=content_type, **self._encryption
            )

        await self._threads.run(work)
        return f"s3://{self._bucket}/{name}"

    async def get(self, key: str, *, limit: int) -> bytes:
        name = self._prefix + checked(key)

        def work() -> bytes:
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=name)
            except self._client.exceptions.NoSuchKey as error:
                raise KeyError(f"There is nothing at '{key}'.") from error
            with found["Body"] as body:
                if found["ContentLength"] > limit:
                    raise ValueError(f"'{key}' is larger than {limit} bytes.")
                return body.read()

        return await self._threads.run(work)

    async def fetch(self, reference: str, into: Callable[[bytes], object], *, limit: int) -> None:
        root = f"s3://{self._bucket}/{self._prefix}"
        key = checked(reference.removeprefix(root))
        if not reference.startswith(root) or not key.startswith("staging/"):
            raise ValueError(f"{reference[:200]!r} is no audio that is staged here.")

        def work() -> None:
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            except self._client.exceptions.ClientError as error:
                # Without the right to list the bucket, S3 says 403 of what is not there.
                if error.response["Error"]["Code"] not in ("NoSuchKey", "AccessDenied"):
                    raise
                raise KeyError(f"There is nothing at '{reference}'.") from error
            with contextlib.closing(found["Body"]) as body:
                if found["ContentLength"] > limit:
                    raise ValueError(f"'{reference}' is larger than {limit} bytes.")
                while piece := body.read(_PIECE):
                    into(piece)

        await self._threads.run(work)

    async def remove(self, key: str) -> None:
        name = self._prefix + checked(key)
        await self._threads.run(lambda: self._client.delete_object(Bucket=self._bucket, Key=name))

    async def sweep(self, *, audio_seconds: float = 86_400, result_seconds: float = 2 * 86_400) -> int:
        return 0  # the bucket's lifecycle rules do it

    async def presign_upload(
        self, account_id: str, request_id: str, *, max_bytes: int, seconds: int
    ) -> PresignedUpload:
        key = audio_key(account_id, request_id)
        if not 1 <= seconds <= 900:
            raise ValueError(f"An upload may be signed for 1 to 900 seconds, not {seconds}.")
        if max_bytes < 1:
            raise ValueError(f"An upload of at most {max_bytes} bytes would be empty.")
        fields = {"x-amz-server-side-encryption": str(self._encryption["ServerSideEncryption"])}
        if "SSEKMSKeyId" in self._encryption:
            fields["x-amz-server-side-encryption-aws-kms-key-id"] = self._encryption["SSEKMSKeyId"]
        # botocore adds the bucket and the key; S3 refuses a form with any field that is not named here.
        conditions = [*({name: value} for name, value in fields.items()), ["content-length-range", 1, max_bytes]]
        expires = int(time.time()) + seconds
        # In a thread, because it may have to fetch new credentials.
        signed = await self._threads.run(
            lambda: self._client.generate_presigned_post(
                self._bucket, self._prefix + key, Fields=fields, Conditions=conditions, ExpiresIn=seconds
            )
        )
        return PresignedUpload(signed["url"], signed["fields"], key, expires)

    async def close(self) -> None:
        await self._threads.close()
        if self._own_client:
            self._client.close()


def _client() -> S3Client:
    # Half a second of imports that only those pay who stage in S3.
    import boto3
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",
        retries={"mode": "standard", "total_max_attempts": 4},
        connect_timeout=2,
        read_timeout=10,
        # Otherwise botocore signs uploads for the global endpoint, which redirects them from every
        # region but us-east-1, and browsers do not follow with a form.
        s3={"addressing_style": "virtual"},
    )
    # Not `boto3.client`: its default session is shared, and is not safe to use from several threads.
    return boto3.session.Session().client("s3", config=config)
