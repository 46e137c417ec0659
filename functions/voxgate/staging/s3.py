"""Staging in an S3 bucket, whose lifecycle rules remove what a dead request leaves behind."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Literal, Required, TypedDict

from voxgate.staging import checked
from voxgate.tasks import Threads

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PIECE = 1024 * 1024


class _Encryption(TypedDict, total=False):
    ServerSideEncryption: Required[Literal["AES256", "aws:kms"]]
    SSEKMSKeyId: str


class S3Staging:
    """Implements `Staging` and `References`.

    Needs `s3:ListBucket`: without it S3 says 403, not 404, of an object that is not there.
    """

    def __init__(self, bucket: str, *, client: S3Client | None = None, kms_key_id: str = "") -> None:
        self._bucket = bucket
        self._own_client = client is None
        self._client = client or _client()
        self._encryption: _Encryption = {"ServerSideEncryption": "AES256"}
        if kms_key_id:
            self._encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key_id}
        self._threads = Threads("staging", 8)

    async def put(self, key: str, content: BinaryIO | bytes, *, content_type: str = "application/octet-stream") -> str:
        name = checked(key)
        body = io.BytesIO(content) if isinstance(content, bytes) else content

        def work() -> None:
            body.seek(0)  # botocore sends from where the file stands
            self._client.put_object(
                Bucket=self._bucket, Key=name, Body=body, ContentType=content_type, **self._encryption
            )

        await self._threads.run(work)
        return f"s3://{self._bucket}/{name}"

    async def get(self, key: str, *, limit: int) -> bytes:
        content = io.BytesIO()
        await self._read(checked(key), key, content.write, limit, absent=("NoSuchKey",))
        return content.getvalue()

    async def fetch(self, reference: str, into: Callable[[bytes], object], *, limit: int) -> None:
        root = f"s3://{self._bucket}/"
        key = checked(reference.removeprefix(root))
        if not reference.startswith(root) or not key.startswith("staging/"):
            raise ValueError(f"{reference[:200]!r} is no audio that is staged here.")
        # Without the right to list the bucket, S3 says 403 of what is not there.
        await self._read(key, reference, into, limit, absent=("NoSuchKey", "AccessDenied"))

    async def _read(
        self, key: str, called: str, into: Callable[[bytes], object], limit: int, *, absent: tuple[str, ...]
    ) -> None:
        """Piece by piece; what it is `called` is for the messages, `absent` the codes of what is not there."""

        def work() -> None:
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=key)
            except self._client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in absent:
                    raise
                raise KeyError(f"There is nothing at '{called}'.") from error
            with contextlib.closing(found["Body"]) as body:
                if found["ContentLength"] > limit:
                    raise ValueError(f"'{called}' is larger than {limit} bytes.")
                while piece := body.read(_PIECE):
                    into(piece)

        await self._threads.run(work)

    async def remove(self, key: str) -> None:
        name = checked(key)
        await self._threads.run(lambda: self._client.delete_object(Bucket=self._bucket, Key=name))

    async def sweep(self, *, audio_seconds: float = 86_400, result_seconds: float = 2 * 86_400) -> int:
        return 0  # the bucket's lifecycle rules do it

    async def close(self) -> None:
        await self._threads.close()
        if self._own_client:
            self._client.close()


def _client() -> S3Client:
    # Half a second of imports that only those pay who stage in S3.
    import boto3
    from botocore.config import Config

    config = Config(retries={"mode": "standard", "total_max_attempts": 4}, connect_timeout=2, read_timeout=10)
    # Not `boto3.client`: its default session is shared, and is not safe to use from several threads.
    return boto3.session.Session().client("s3", config=config)
