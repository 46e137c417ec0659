"""An upload's two ways of being held, and which audio parts a form must have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from voxgate.errors import InvalidInput, TooLarge
from voxgate.multipart import Field, Limits
from voxgate.receive import Form, Upload, receive

SMALL = 256 * 1024  # bytes, held in memory


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    suffix = "" if filename is None else f'; filename="{filename}"'
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{suffix}\r\n\r\n'.encode() + content + b"\r\n"


async def chunks(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def take(into: Upload, *parts: bytes, limits: Limits | None = None, field: str = "file") -> Form:
    content = b"".join(parts) + b"--b--\r\n"
    body = chunks([content[i : i + 64 * 1024] for i in range(0, len(content), 64 * 1024)])
    kind = "multipart/form-data; boundary=b"
    return asyncio.run(receive(body, kind, limits=limits or Limits(), audio_field=field, into=into))


def test_a_small_upload_touches_no_disk(tmp_path: Path) -> None:
    with Upload(tmp_path) as upload:
        upload.write(b"x" * SMALL)
        assert list(tmp_path.iterdir()) == []
        upload.file.seek(0)
        assert upload.file.read() == b"x" * SMALL
        assert upload.size == SMALL


def test_a_larger_upload_is_a_file_that_is_removed(tmp_path: Path) -> None:
    with Upload(tmp_path) as upload:
        upload.write(b"x" * SMALL)
        upload.write(b"y")
        upload.write(b"z")
        (file,) = tmp_path.iterdir()
        assert file == upload.path()
        assert file.read_bytes() == b"x" * SMALL + b"yz"
        assert file.stat().st_mode & 0o077 == 0
        upload.file.seek(SMALL)
        assert upload.file.read() == b"yz"
        assert upload.size == SMALL + 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 10, SMALL, SMALL + 1])
def test_the_path_of_any_upload_holds_all_of_it(tmp_path: Path, size: int) -> None:
    with Upload(tmp_path) as upload:
        upload.write(b"x" * size)
        assert upload.path().read_bytes() == b"x" * size
        assert upload.path() == upload.path()
        upload.file.seek(0)
        assert upload.file.read() == b"x" * size
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [10, 2 * SMALL])
def test_an_upload_is_removed_when_what_uses_it_fails(tmp_path: Path, size: int) -> None:
    def fail() -> None:
        with Upload(tmp_path) as upload:
            upload.write(b"x" * size)
            assert upload.path().exists()
            raise RuntimeError("engine")

    with pytest.raises(RuntimeError, match="engine"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    upload = Upload(tmp_path)
    upload.write(b"x")
    upload.path()
    upload.close()
    upload.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 10, 3 * SMALL])
def test_the_form_is_split_into_fields_audio_and_other_files(tmp_path: Path, size: int) -> None:
    audio = bytes(i % 251 for i in range(1000)) * (size // 1000) + b"-" * (size % 1000)
    with Upload(tmp_path) as upload:
        form = take(
            upload,
            part("model", b"whisper-1"),
            part("cover", b"JPEG", "cover.jpg"),
            part("file", audio, "a.wav"),
            part("tag", b"1"),
            part("tag", b"2"),
            part("notes", b"text", "notes.txt"),
        )
        upload.file.seek(0)
        assert upload.file.read() == audio
        assert upload.size == len(audio)
    assert form == Form((Field("model", "whisper-1"), Field("tag", "1"), Field("tag", "2")), ("cover", "notes"))


@pytest.mark.parametrize("field", ["file", "audio"])
def test_a_missing_audio_part_is_named(tmp_path: Path, field: str) -> None:
    with Upload(tmp_path) as upload, pytest.raises(InvalidInput) as caught:
        take(upload, part("model", b"whisper-1"), field=field)
    assert caught.value.message == f"Missing required field '{field}': the audio file."
    assert caught.value.param == field


def test_a_file_part_of_another_name_is_pointed_out(tmp_path: Path) -> None:
    with Upload(tmp_path) as upload, pytest.raises(InvalidInput, match="a file part 'audio', which must be renamed"):
        take(upload, part("audio", b"x", "a.wav"))


def test_audio_sent_as_text_is_told_from_none(tmp_path: Path) -> None:
    with Upload(tmp_path) as upload, pytest.raises(InvalidInput, match="'file' was sent as text") as caught:
        take(upload, part("file", b"x"))
    assert caught.value.param == "file"


def test_two_audio_parts_are_refused_before_the_second_is_taken(tmp_path: Path) -> None:
    with Upload(tmp_path) as upload, pytest.raises(InvalidInput, match="two 'file' parts") as caught:
        take(upload, part("file", b"one", "a.wav"), part("file", b"two", "b.wav"))
    assert caught.value.param == "file"
    assert upload.size == 3


def test_audio_over_the_limit_is_refused_and_removed(tmp_path: Path) -> None:
    with pytest.raises(TooLarge) as caught, Upload(tmp_path) as upload:
        take(upload, part("file", b"x" * 3 * SMALL, "a.wav"), limits=Limits(file=2 * SMALL))
    assert caught.value.param == "file"
    assert list(tmp_path.iterdir()) == []


def test_an_upload_cut_off_is_refused(tmp_path: Path) -> None:
    async def run(upload: Upload) -> None:
        body = chunks([part("file", b"x" * 100, "a.wav")[:-20]])
        await receive(body, "multipart/form-data; boundary=b", limits=Limits(), audio_field="file", into=upload)

    with Upload(tmp_path) as upload, pytest.raises(InvalidInput, match="cut off"):
        asyncio.run(run(upload))


def test_a_client_that_fails_while_sending_leaves_no_file(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield part("file", b"x" * 2 * SMALL, "a.wav")
        raise ConnectionResetError

    async def run() -> None:
        with Upload(tmp_path) as upload:
            await receive(broken(), "multipart/form-data; boundary=b", limits=Limits(), audio_field="file", into=upload)

    with pytest.raises(ConnectionResetError):
        asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_finds_no_disk_says_so_and_can_be_closed(tmp_path: Path) -> None:
    def try_it() -> None:
        with Upload(tmp_path / "gone") as upload:  # which is closed while the failure is still being told
            upload.write(b"a")
            upload.path()

    with pytest.raises(FileNotFoundError):
        try_it()
