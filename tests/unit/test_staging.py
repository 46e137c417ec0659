"""One suite for both stores; what only one of them can promise is after it."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from mypy_boto3_s3 import S3Client

from fakes.bucket import bucket
from fakes.bucket import s3 as s3_service
from voxgate.staging import Staging, audio_key, result_key
from voxgate.staging.local import LocalStaging
from voxgate.staging.s3 import S3Staging
from voxgate.tasks import Threads

T = TypeVar("T")
MEBIBYTE = 1024 * 1024
BUCKET = "voxgate-staging"
NOW = 1_800_000_000.0
KEY = audio_key("acct_1", "req-1")
SHAPE = re.compile(r"(staging|results)/[A-Za-z0-9_-]{1,128}/[A-Za-z0-9_-]{1,128}", re.ASCII)

# Text that has climbed out of directories before, or looks like an id and is none.
HOSTILE = [
    "",
    ".",
    "..",
    "a/b",
    "/",
    "/etc",
    "a\\..\\b",
    "..\\",
    "a\0",
    "\0",
    "a\n",
    "\n",
    "a b",
    "%2e%2e",
    "a%2fb",
    "~",
]
HOSTILE += [
    "C:",
    "a:b",
    ".hidden",
    "a.wav",
    "${filename}",
    "a*",
    "é",
    "ａ",
    "а",
    "٣",
    "‥",
    "a\u2215b",
    "a\u200b",
    "x" * 129,
]
parts = st.text() | st.sampled_from(HOSTILE) | st.from_regex(r"[A-Za-z0-9_-]{1,130}", fullmatch=True)


@dataclass(frozen=True)
class Place:
    """A store, and what lies in it, read past the store: names to contents, all of its files."""

    staging: Staging
    contents: Callable[[], dict[str, bytes]]
    reference: str


def run(work: Coroutine[Any, Any, T]) -> T:
    """Each time in an event loop of its own, which the stores have to bear."""
    return asyncio.run(work)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "below" / "staging area"


@pytest.fixture
def local(root: Path) -> Iterator[LocalStaging]:
    staging = LocalStaging(root, clock=lambda: NOW)
    yield staging
    run(staging.close())


@pytest.fixture(scope="module")
def aws() -> Iterator[S3Client]:
    with s3_service() as client:
        yield client


@pytest.fixture
def s3(aws: S3Client) -> Iterator[S3Client]:
    with bucket(aws, BUCKET):
        yield aws


@pytest.fixture
def in_s3(s3: S3Client) -> Iterator[S3Staging]:
    staging = S3Staging(BUCKET)
    yield staging
    run(staging.close())


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "local":
        local, root = request.getfixturevalue("local"), request.getfixturevalue("root")
        return Place(local, lambda: files_below(root), root.as_uri())
    in_s3, client = request.getfixturevalue("in_s3"), request.getfixturevalue("s3")
    return Place(in_s3, lambda: objects_in(client), f"s3://{BUCKET}")


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def objects_in(client: S3Client) -> dict[str, bytes]:
    names = [found["Key"] for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]
    return {name: client.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}


class Breaking(io.BytesIO):
    """A file whose disk fails after its first MiB."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= MEBIBYTE:
            raise OSError("the disk is gone")
        return super().read(MEBIBYTE)


class Waiting(io.BytesIO):
    """A file that says when it is read and gives nothing until it may."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reached, self.may = threading.Event(), threading.Event()

    def read(self, size: int | None = -1, /) -> bytes:
        self.reached.set()
        assert self.may.wait(10)
        return super().read(size)


class Noting(io.BytesIO):
    """A file that notes how much of it is asked for at once."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.sizes: list[int | None] = []

    def read(self, size: int | None = -1, /) -> bytes:
        self.sizes.append(size)
        return super().read(size)


# Keys


def test_keys_are_of_the_account_and_the_request() -> None:
    assert audio_key("acct_1", "req-1") == "staging/acct_1/req-1"
    assert result_key("acct_1", "x" * 128) == f"results/acct_1/{'x' * 128}"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: audio_key("..", "r"), "account id"),
        (lambda: audio_key("a", ".."), "request id"),
        (lambda: result_key("", "n"), "account id"),
        (lambda: result_key("a", "n/m"), "name"),
    ],
)
def test_a_part_that_is_refused_is_named(make: Callable[[], str], what: str) -> None:
    with pytest.raises(ValueError, match=f"The {what} "):
        make()


@given(make=st.sampled_from([audio_key, result_key]), account=parts, name=parts)
def test_no_text_escapes_its_place_in_a_key(make: Callable[[str, str], str], account: str, name: str) -> None:
    try:
        key = make(account, name)
    except ValueError:
        assert not SHAPE.fullmatch(f"staging/{account}/{name}")
    else:
        assert SHAPE.fullmatch(key)
        assert key.split("/")[1:] == [account, name]


def test_no_other_key_is_taken(place: Place, tmp_path: Path) -> None:
    keys = parts | st.tuples(st.sampled_from(["staging", "results", "", "other", ".."]), parts, parts).map("/".join)
    refused = []

    @given(key=keys)
    def every(key: str) -> None:
        if SHAPE.fullmatch(key):
            run(place.staging.put(key, b"x"))
            assert run(place.staging.get(key, limit=1)) == b"x"
            return
        refused.append(key)
        for work in (place.staging.put(key, b"x"), place.staging.get(key, limit=9), place.staging.remove(key)):
            with pytest.raises(ValueError, match="is not a key"):
                run(work)

    every()
    for name in HOSTILE:
        for key in (
            f"staging/{name}/r",
            f"results/a/{name}",
            f"{name}/a/r",
            f"staging/a/r/{name}",
            f"{name}staging/a/r",
        ):
            if not SHAPE.fullmatch(key):
                with pytest.raises(ValueError, match="is not a key"):
                    run(place.staging.put(key, b"x"))
    assert len(refused) > 20
    stored = place.contents()
    assert all(SHAPE.fullmatch(name) for name in stored)
    assert {path.name for path in tmp_path.iterdir()} <= {"below"}


# Both stores


@pytest.mark.parametrize("content", [b"", b"\x00audio\xff", os.urandom(70_000)], ids=["empty", "short", "long"])
def test_bytes_come_back(place: Place, content: bytes) -> None:
    for key in (KEY, result_key("acct_1", "req-1")):
        assert run(place.staging.put(key, content)) == f"{place.reference}/{key}"
        assert run(place.staging.get(key, limit=len(content))) == content
    assert set(place.contents()) == {"staging/acct_1/req-1", "results/acct_1/req-1"}


def test_a_file_comes_back_whole_wherever_it_stood(place: Place, tmp_path: Path) -> None:
    content = os.urandom(5 * MEBIBYTE)
    (tmp_path / "audio").write_bytes(content)
    with (tmp_path / "audio").open("rb") as file:
        file.seek(1000)
        run(place.staging.put(KEY, file))
        assert not file.closed
        run(place.staging.put(result_key("acct_1", "again"), file))  # it stands anywhere now
    (tmp_path / "audio").unlink()
    assert run(place.staging.get(KEY, limit=len(content))) == content
    assert place.contents() == {KEY: content, "results/acct_1/again": content}


def test_a_put_replaces_what_was_there(place: Place) -> None:
    run(place.staging.put(KEY, b"a long first one"))
    run(place.staging.put(KEY, b"second"))
    assert place.contents() == {KEY: b"second"}


def test_what_is_not_there_is_a_key_error_to_get_and_fine_to_remove(place: Place) -> None:
    run(place.staging.remove(KEY))
    with pytest.raises(KeyError, match=KEY):
        run(place.staging.get(KEY, limit=10))
    run(place.staging.put(audio_key("acct_1", "another"), b"x"))
    with pytest.raises(KeyError, match=KEY):
        run(place.staging.get(KEY, limit=10))


def test_a_removed_one_is_gone_and_only_that_one(place: Place) -> None:
    other = result_key("acct_1", "req-1")
    run(place.staging.put(KEY, b"x"))
    run(place.staging.put(other, b"y"))
    run(place.staging.remove(KEY))
    run(place.staging.remove(KEY))
    assert place.contents() == {other: b"y"}


def test_nothing_larger_than_the_limit_is_read(place: Place) -> None:
    run(place.staging.put(KEY, b"12345"))
    assert run(place.staging.get(KEY, limit=5)) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        run(place.staging.get(KEY, limit=4))


def test_accounts_with_the_same_request_id_do_not_meet(place: Place) -> None:
    run(place.staging.put(audio_key("a", "r"), b"of a"))
    run(place.staging.put(audio_key("b", "r"), b"of b"))
    run(place.staging.remove(audio_key("a", "r")))
    assert run(place.staging.get(audio_key("b", "r"), limit=10)) == b"of b"
    with pytest.raises(KeyError):
        run(place.staging.get(audio_key("a", "r"), limit=10))


def test_a_put_that_fails_midway_leaves_nothing(place: Place) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        run(place.staging.put(KEY, Breaking(bytes(3 * MEBIBYTE))))
    assert place.contents() == {}
    with pytest.raises(KeyError):
        run(place.staging.get(KEY, limit=3 * MEBIBYTE))


def test_a_put_that_fails_midway_leaves_what_was_there(place: Place) -> None:
    run(place.staging.put(KEY, b"first"))
    with pytest.raises(OSError, match="the disk is gone"):
        run(place.staging.put(KEY, Breaking(bytes(3 * MEBIBYTE))))
    assert place.contents() == {KEY: b"first"}


def test_several_loops_at_once_do_not_mix_their_audio(place: Place) -> None:
    async def several(account: str) -> None:
        contents = {audio_key(account, str(number)): os.urandom(50_000) for number in range(12)}
        await asyncio.gather(*(place.staging.put(key, io.BytesIO(content)) for key, content in contents.items()))
        seen = await asyncio.gather(*(place.staging.get(key, limit=50_000) for key in contents))
        assert seen == list(contents.values())

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda account: run(several(account)), ("a", "b", "c")))
    assert len(place.contents()) == 36


def test_a_cancelled_put_is_over_when_it_says_so(place: Place) -> None:
    file = Waiting(b"audio")

    async def work() -> None:
        put = asyncio.create_task(place.staging.put(KEY, file))
        await asyncio.to_thread(file.reached.wait, 10)
        put.cancel()
        await asyncio.wait([put], timeout=0.1)
        assert not put.done()
        file.may.set()
        with pytest.raises(asyncio.CancelledError):
            await put
        file.close()
        await place.staging.remove(KEY)

    run(work())
    assert place.contents() == {}


def test_what_has_not_begun_is_never_done_once_cancelled() -> None:
    may, done = threading.Event(), []

    async def work() -> None:
        threads = Threads("staging", 8)
        busy = [asyncio.create_task(threads.run(lambda: may.wait(10))) for _ in range(8)]
        waiting = asyncio.create_task(threads.run(lambda: done.append(1)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, 5)
        may.set()
        assert all(await asyncio.gather(*busy))
        await threads.close()

    run(work())
    assert done == []


def test_a_store_is_closed_once_or_twice(place: Place) -> None:
    run(place.staging.close())
    run(place.staging.close())


def test_the_stores_stay_out_of_the_way_at_import() -> None:
    script = "import sys, voxgate.staging.local, voxgate.staging.s3; sys.exit('botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# Files


def test_files_are_for_nobody_else(local: LocalStaging, root: Path) -> None:
    before = os.umask(0)
    try:
        run(local.put(KEY, b"x"))
        run(local.put(result_key("a", "n"), io.BytesIO(b"x")))
    finally:
        os.umask(before)
    found = {(path.is_dir(), oct(path.stat().st_mode & 0o7777)) for path in [root, *root.rglob("*")]}
    assert found == {(True, "0o700"), (False, "0o600")}


def test_the_reference_is_the_file(local: LocalStaging, root: Path) -> None:
    reference = run(local.put(KEY, b"audio"))
    assert Path(unquote(urlsplit(reference).path)).read_bytes() == b"audio"


def test_a_large_file_is_read_in_pieces(local: LocalStaging) -> None:
    file = Noting(bytes(5 * MEBIBYTE))
    run(local.put(KEY, file))
    assert file.sizes
    assert all(size is not None and 0 < size <= MEBIBYTE for size in file.sizes)


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(local: LocalStaging) -> None:
    run(local.put(KEY, b"old"))
    file = Waiting(b"new")

    async def work() -> None:
        put = asyncio.create_task(local.put(KEY, file))
        await asyncio.to_thread(file.reached.wait, 10)
        assert await local.get(KEY, limit=10) == b"old"
        file.may.set()
        await put
        assert await local.get(KEY, limit=10) == b"new"

    run(work())


# Of S3 this is S3's own promise; moto loses an object that two threads put at once.
def test_puts_and_gets_of_one_key_at_once_see_whole_values_only(local: LocalStaging, root: Path) -> None:
    values = [bytes([number]) * (200_000 + number) for number in range(24)]

    async def several(some: list[bytes]) -> list[bytes]:
        seen: list[bytes] = []
        for value in some:
            puts = [local.put(KEY, io.BytesIO(value)), local.put(KEY, value)]
            got = await asyncio.gather(*(local.get(KEY, limit=300_000) for _ in range(4)), *puts)
            seen += [value for value in got if isinstance(value, bytes)]
        return seen

    run(local.put(KEY, values[0]))
    with ThreadPoolExecutor(3) as threads:
        seen = [value for all_ in threads.map(lambda first: run(several(values[first::3])), range(3)) for value in all_]
    assert len(seen) == 96
    assert all(value in values for value in seen)
    [(name, value)] = files_below(root).items()
    assert name == KEY
    assert value in values


def test_a_link_in_place_of_a_file_is_not_followed(local: LocalStaging, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    run(local.put(KEY, b"x"))
    (root / KEY).unlink()
    (root / KEY).symlink_to(secret)
    with pytest.raises(OSError, match="symbolic link"):
        run(local.get(KEY, limit=100))
    run(local.put(KEY, b"audio"))
    assert (run(local.get(KEY, limit=100)), secret.read_bytes()) == (b"audio", b"secret")
    (root / KEY).unlink()
    (root / KEY).symlink_to(secret)
    run(local.remove(KEY))
    assert not (root / KEY).is_symlink()
    assert secret.exists()


@pytest.mark.parametrize(("link", "below"), [("staging", "acct_1/req-1"), ("staging/acct_1", "req-1")])
def test_a_link_in_place_of_a_directory_is_not_followed(
    local: LocalStaging, root: Path, tmp_path: Path, link: str, below: str
) -> None:
    outside = tmp_path / "outside"
    (outside / below).parent.mkdir(parents=True)
    (outside / below).write_bytes(b"secret")
    os.utime(outside / below, (0, 0))
    before = files_below(outside)
    assert before
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(outside)
    for work in (local.get(KEY, limit=100), local.put(KEY, b"x"), local.remove(KEY)):
        with pytest.raises(OSError, match=r"Not a directory|symbolic link"):
            run(work)
    assert run(local.sweep()) == 0
    assert files_below(outside) == before


def aged(root: Path, key: str, seconds: float) -> None:
    os.utime(root / key, (NOW - seconds, NOW - seconds))


def test_a_sweep_removes_what_is_older_and_its_empty_directories(local: LocalStaging, root: Path) -> None:
    ages = {
        audio_key("old", "r"): 86_401,
        audio_key("both", "old"): 86_401,
        audio_key("both", "new"): 86_399,
        result_key("old", "n"): 2 * 86_400 + 1,
        result_key("new", "n"): 2 * 86_400 - 1,
    }
    for key, age in ages.items():
        run(local.put(key, b"x"))
        aged(root, key, age)
    assert run(local.sweep()) == 3
    assert set(files_below(root)) == {"staging/both/new", "results/new/n"}
    assert {path.name for path in root.glob("*/*")} == {"both", "new"}
    assert run(local.sweep()) == 0
    assert run(local.sweep(audio_seconds=86_398, result_seconds=86_400)) == 2
    assert [path.name for path in sorted(root.rglob("*"))] == ["results", "staging"]


def test_a_sweep_removes_what_a_killed_put_left(local: LocalStaging, root: Path) -> None:
    script = (
        "import asyncio, io, os, sys, pathlib\n"
        "from voxgate.staging.local import LocalStaging\n"
        "class Killed(io.BytesIO):\n"
        "    def read(self, size=-1): os._exit(9)\n"
        "asyncio.run(LocalStaging(pathlib.Path(sys.argv[1])).put(sys.argv[2], Killed(b'x')))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(root), KEY], check=False).returncode == 9
    [left] = files_below(root)
    assert left != KEY
    aged(root, left, 86_401)
    assert run(local.sweep()) == 1
    assert files_below(root) == {}


def test_a_sweep_goes_by_the_age_of_a_link_and_not_of_its_target(
    local: LocalStaging, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    os.utime(tmp_path / "secret", (NOW, NOW))
    (root / KEY).parent.mkdir(parents=True)
    (root / KEY).symlink_to(tmp_path / "secret")
    os.utime(root / KEY, (0, 0), follow_symlinks=False)
    assert run(local.sweep()) == 1
    assert (tmp_path / "secret").exists()


def test_a_sweep_of_nothing_is_fine(local: LocalStaging) -> None:
    assert run(local.sweep()) == 0


def test_a_sweep_takes_nothing_from_under_a_put(root: Path) -> None:
    stop = threading.Event()

    async def sweeping(staging: LocalStaging) -> None:
        while not stop.is_set():
            await staging.sweep(audio_seconds=3600)

    async def work(staging: LocalStaging) -> None:
        for _ in range(400):
            await staging.put(KEY, b"x")
            assert await staging.get(KEY, limit=1) == b"x"
            await staging.remove(KEY)

    stagings = [LocalStaging(root) for _ in range(2)]
    with ThreadPoolExecutor(1) as thread:
        swept = thread.submit(lambda: run(sweeping(stagings[0])))
        try:
            run(work(stagings[1]))
        finally:
            stop.set()
        swept.result()
    for staging in stagings:
        run(staging.close())


# S3


@pytest.mark.parametrize(
    ("kms_key_id", "algorithm"), [("", "AES256"), ("alias/voxgate", "aws:kms")], ids=["sse-s3", "sse-kms"]
)
def test_objects_are_encrypted(s3: S3Client, kms_key_id: str, algorithm: str) -> None:
    staging = S3Staging(BUCKET, client=s3, kms_key_id=kms_key_id)
    run(staging.put(KEY, b"x", content_type="audio/flac"))
    run(staging.close())
    head = s3.head_object(Bucket=BUCKET, Key=KEY)  # an injected client stays open
    assert (head["ServerSideEncryption"], head.get("SSEKMSKeyId", "")) == (algorithm, kms_key_id)
    assert head["ContentType"] == "audio/flac"


def test_what_else_s3_refuses_is_not_taken_for_absence(s3: S3Client) -> None:
    staging = S3Staging("voxgate-nowhere", client=s3)
    with pytest.raises(ClientError, match="NoSuchBucket"):
        run(staging.get(KEY, limit=10))
    run(staging.close())


def test_the_bucket_sweeps_itself(in_s3: S3Staging) -> None:
    run(in_s3.put(KEY, b"x"))
    assert run(in_s3.sweep(audio_seconds=-10)) == 0
    assert run(in_s3.get(KEY, limit=1)) == b"x"
