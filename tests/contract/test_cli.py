"""The `voxgate` command as a person and a script use it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from conftest import DATA, ROOT, Server, word_errors
from customers import Office, command
from voxgate.audio.decode import decode

SPEECH = DATA / "b-slt.mp3"
TEXT = "the weather is nice today and we are going to the park"
SHORT, SHORT_TEXT = DATA / "a-mp3-cbr.mp3", "please send the letter"  # which is soon recognized


def voxgate(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own; `command` is quicker where only what it says matters."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")}
    command = [sys.executable, "-m", "voxgate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=clean | environment)


def client(server: Server) -> dict[str, str]:
    return {"VOXGATE_BASE_URL": server.url, "VOXGATE_API_KEY": server.key}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["transcribe"],
        ["live"],
        ["inference"],
        ["invoke"],
        ["accounts"],
        ["accounts", "create"],
        ["accounts", "list"],
        ["accounts", "show"],
        ["accounts", "change"],
        ["accounts", "suspend"],
        ["accounts", "resume"],
        ["accounts", "credit"],
        ["accounts", "refund"],
        ["accounts", "adjust"],
        ["keys", "create"],
        ["keys", "list"],
        ["keys", "revoke"],
        ["keys", "rotate"],
        ["usage"],
        ["sweep"],
        ["audit"],
    ],
    ids=" ".join,
)
def test_every_command_explains_itself(arguments: list[str]) -> None:
    done = command(*arguments, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: voxgate")


def test_transcribe_prints_the_text_and_nothing_else_into_a_pipe(server: Server) -> None:
    done = voxgate("transcribe", SHORT, **client(server))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{SHORT_TEXT}\n", "")


def test_transcribe_takes_a_base_url_with_v1_as_the_sdks_do(server: Server) -> None:
    done = command("transcribe", SHORT, "--base-url", f"{server.url}/v1/", "--api-key", server.key)
    assert done.stdout == f"{SHORT_TEXT}\n"


@pytest.mark.parametrize("format_", ["text", "json", "verbose_json", "srt", "vtt"])
def test_transcribe_writes_every_format_to_a_file(server: Server, tmp_path: Path, format_: str) -> None:
    done = command("transcribe", SHORT, "--format", format_, "--output", tmp_path / "out", **client(server))
    assert (done.returncode, done.stdout) == (0, "")
    content = (tmp_path / "out").read_text(encoding="utf-8")
    assert SHORT_TEXT in content
    if format_.endswith("json"):
        assert json.loads(content)["text"] == SHORT_TEXT


def test_transcribe_takes_several_files_and_goes_on_after_a_bad_one(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = [SHORT, DATA / "not-pdf.pdf", tmp_path / "missing.wav", DATA / "a-flac.flac"]
    done = voxgate("transcribe", *files, "--format", "srt", "--output", out, **client(server))
    assert done.returncode == 1
    assert "not-pdf.pdf: Unrecognized file format: this is a PDF" in done.stderr
    assert "missing.wav: No such file" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["a-flac.flac.srt", "a-mp3-cbr.mp3.srt"]


def test_transcribe_shows_its_progress_on_a_terminal(server: Server) -> None:
    mine, its = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")}
    command = [sys.executable, "-m", "voxgate", "transcribe", str(SHORT)]
    environment = clean | client(server) | {"TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=its, text=True, timeout=60, check=True, env=environment
    )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal says that there is no more
        while chunk := os.read(mine, 100_000):
            shown += chunk
    os.close(mine)
    assert done.stdout == f"{SHORT_TEXT}\n"
    assert "a-mp3-cbr.mp3: transcribing" in shown.decode()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["transcribe", "x.wav"], {}, "set VOXGATE_API_KEY"),
        (
            ["transcribe", str(SHORT), "--base-url", "http://127.0.0.1:9"],
            {"VOXGATE_API_KEY": "x"},
            "cannot be reached",
        ),
        (["invoke", "missing.json"], {}, "missing.json: No such file"),
        (["serve", "--catalog", "missing.toml"], {}, "missing.toml: cannot be read"),
        (["serve"], {"VOXGATE_PROVIDER_TIMEOUT": "soon"}, "VOXGATE_PROVIDER_TIMEOUT must be a number"),
        (["serve", "--host", "203.0.113.1"], {}, "cannot be used"),
    ],
    ids=["no-key", "no-server", "no-event", "no-catalogue", "bad-setting", "no-such-address"],
)
def test_a_mistake_is_one_line_on_stderr_and_a_failing_status(
    arguments: list[str], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = (voxgate if arguments[0] == "serve" else command)(*arguments, **environment, VOXGATE_DATA_DIR=str(tmp_path))
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_key_says_so(server: Server) -> None:
    done = command("transcribe", SHORT, VOXGATE_BASE_URL=server.url, VOXGATE_API_KEY="vg_wrong")
    assert done.returncode == 1
    assert "That is no API key of this service: it may be cut off or mistyped. (401 unauthenticated)" in done.stderr


def test_accounts_and_keys_from_opening_to_revoking(server: Server) -> None:
    directory = ["--data-dir", str(server.data_dir)]
    account = json.loads(command("accounts", "create", "acme", "--json", *directory).stdout)
    assert command("accounts", "create", "acme", *directory).returncode == 1
    key = json.loads(command("keys", "create", "acme", "--json", *directory).stdout)
    assert re.fullmatch(r"vg_[0-9a-zA-Z]{36}", key["key"])
    headers = {"authorization": f"Bearer {key['key']}"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    shown = command("accounts", "show", account["id"], "--json", *directory).stdout
    assert [k["id"] for k in json.loads(shown)["keys"]] == [key["id"]]
    assert key["key"] not in shown
    assert command("keys", "revoke", key["id"], *directory).returncode == 0
    deadline = time.monotonic() + 60  # until when a server may rely on what it has read
    while httpx.get(f"{server.url}/v1/models", headers=headers).status_code != 401:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert command("keys", "revoke", "key_missing", *directory).returncode == 1
    assert command("keys", "create", "nobody", *directory).returncode == 1


def at_a_terminal(answer: str, *arguments: str | Path) -> tuple[int, str]:
    """The command's exit status and what it printed, with somebody at its terminal who types `answer`."""
    mine, its = pty.openpty()
    command = [sys.executable, "-m", "voxgate", *map(str, arguments)]
    os.write(mine, f"{answer}\n".encode())
    done = subprocess.run(command, stdin=its, capture_output=True, text=True, timeout=60, check=False)
    os.close(its)
    os.close(mine)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("action", ["revoke", "rotate"])
def test_what_cannot_be_undone_is_asked_before_and_done_after_a_yes(tmp_path: Path, action: str) -> None:
    directory = ["--data-dir", str(tmp_path)]
    command("accounts", "create", "acme", *directory)
    key = json.loads(command("keys", "create", "acme", "--name", "mobile", "--json", *directory).stdout)["id"]

    def revoked() -> list[bool]:
        listed = json.loads(command("keys", "list", "acme", "--json", *directory).stdout)
        return [shown["revoked"] is not None for shown in listed if shown["id"] == key]

    for answer in ("", "n", "what?"):
        status, said = at_a_terminal(answer, "keys", action, key, *directory)
        assert (status, revoked()) == (1, [False])
        assert key in said
        assert "Nothing was changed." in said
    status, said = at_a_terminal("y", "keys", action, key, *directory)
    assert (status, revoked()) == (0, [True])
    assert f"Revoked {key}" in said


def test_each_command_says_what_it_did(tmp_path: Path) -> None:
    directory = ["--data-dir", str(tmp_path)]

    def said(*arguments: str) -> str:
        done = command(*arguments, *directory)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    assert re.fullmatch(
        r"Opened the account 'acme' \(acct_[0-9a-f]{16}\) with \$2\.50\.",
        said("accounts", "create", "acme", "--credit", "2.50"),
    )
    assert "2.500001" in said("accounts", "credit", "acme", "0.000001")
    assert "3.000001" in said("accounts", "refund", "acme", "0.50", "--note", "twice")
    assert "2.00" in said("accounts", "adjust", "acme", "-1.000001")
    assert "acme" in said("accounts", "suspend", "acme")
    assert "suspended" in said("accounts", "show", "acme")
    assert "acme" in said("accounts", "resume", "acme")
    assert "active" in said("accounts", "list")
    assert "budget: 5.00" in said("accounts", "change", "acme", "--budget", "5") + said("accounts", "show", "acme")
    assert "0 holds" in said("sweep")
    assert said("audit") == "All 1 balances are the sums of their entries."


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("acme")
    assert command("accounts", "create", "acme", "--credit", "1", "--data-dir", directory).returncode == 0
    return directory


def everything(directory: Path) -> list[list[tuple[object, ...]]]:
    with contextlib.closing(sqlite3.connect(directory / "voxgate.sqlite")) as db:
        return [db.execute(f"SELECT * FROM {table}").fetchall() for table in ("account", "key", "entry")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["accounts", "credit", "acme", "1e400"],
        ["accounts", "credit", "acme", "0.0000001"],
        ["accounts", "credit", "acme", "nan"],
        ["accounts", "credit", "acme", "-1"],
        ["accounts", "credit", "nobody", "1"],
        ["accounts", "refund", "acme", "-1"],
        ["accounts", "create", " "],
        ["accounts", "create", "other", "--credit", "-1"],
        ["accounts", "create", "other", "--requests-per-minute", "0"],
        ["accounts", "change", "acme", "--budget", "-1"],
        ["keys", "create", "acme", "--expires", "2026-02-30"],
        ["keys", "create", "acme", "--scope", "everything"],
        ["keys", "rotate", "key_missing"],
        ["usage", "nobody"],
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_changes_nothing(acme: Path, arguments: list[str]) -> None:
    before = everything(acme)
    done = command(*arguments, "--data-dir", acme)
    assert done.returncode in (1, 2)
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert everything(acme) == before


def test_the_audit_finds_a_balance_that_is_not_the_sum_of_its_entries(tmp_path: Path) -> None:
    directory = ["--data-dir", str(tmp_path)]
    for name in ("honest", "cooked"):
        command("accounts", "create", name, "--credit", "1", *directory)
    with contextlib.closing(sqlite3.connect(tmp_path / "voxgate.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE account SET balance = balance + 1 WHERE name = 'cooked'")
    done = command("audit", *directory)
    assert done.returncode == 1
    assert "'cooked'" in done.stdout
    assert "$1.000001 and its entries $1.00" in done.stdout
    assert "honest" not in done.stdout
    found = json.loads(command("audit", "--json", *directory).stdout)
    assert (found["accounts"], [d["name"] for d in found["differences"]]) == (2, ["cooked"])


def test_a_key_file_that_outlived_its_database_works_again(tmp_path: Path) -> None:
    assert voxgate("invoke", ROOT / "events/models.json", "--data-dir", tmp_path).returncode == 0
    key = (tmp_path / "api-key").read_text(encoding="ascii")
    for file in tmp_path.glob("voxgate.sqlite*"):
        file.unlink()
    done = voxgate("invoke", ROOT / "events/models.json", "--data-dir", tmp_path)
    assert json.loads(done.stdout)["statusCode"] == 200
    assert (tmp_path / "api-key").read_text(encoding="ascii") == key


def test_the_local_key_is_private_and_kept(server: Server) -> None:
    assert stat.S_IMODE((server.data_dir / "api-key").stat().st_mode) == 0o600
    log = (server.data_dir / "log").read_text(encoding="utf-8")
    assert server.key not in log
    assert TEXT not in log
    assert SHORT_TEXT not in log


def test_the_same_reference_adds_once_and_another_amount_under_it_is_refused(tmp_path: Path) -> None:
    office = Office(tmp_path)
    office.tell("accounts", "create", "acme", "--credit", "1.00")
    for _ in range(2):
        assert office.tell("accounts", "credit", "acme", "5", "--reference", "invoice-1")["balance"] == "6.00"
    other = office.run("accounts", "credit", "acme", "6", "--reference", "invoice-1")
    assert other.returncode == 1
    assert "$5.00" in other.stderr
    assert office.tell("accounts", "show", "acme")["balance_microdollars"] == 6_000_000


def test_a_budget_can_be_taken_away_again(tmp_path: Path) -> None:
    office = Office(tmp_path)
    office.tell("accounts", "create", "acme", "--budget", "1.00", "--requests-per-minute", "6")
    changed = office.tell("accounts", "change", "acme", "--budget", "none", "--requests-per-minute", "none")
    assert (changed["budget"], changed["requests_per_minute"]) == (None, None)


def test_what_is_stored_is_its_owners_alone(tmp_path: Path) -> None:
    office = Office(tmp_path / "data")
    office.tell("accounts", "create", "acme")
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0
    assert (tmp_path / "data" / "voxgate.sqlite").stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_database_is_said_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "voxgate.sqlite").write_bytes(b"not a database, whatever it is called" * 100)
    done = Office(tmp_path).run("accounts", "list")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "not a database" in done.stderr


# Speech while it is spoken.


def raw(path: Path = SHORT, seconds: float = 60.0) -> bytes:
    return b"".join(decode(str(path), "mp3", max_seconds=60))[: round(seconds * 32_000)]


def piped(server: Server, audio: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")}
    command = [sys.executable, "-m", "voxgate", "live", "-", *arguments]
    return subprocess.run(
        command, input=audio, capture_output=True, timeout=60, check=False, env=clean | client(server)
    )


def test_live_prints_the_text_and_nothing_else_into_a_pipe(server: Server) -> None:
    done = voxgate("live", SHORT, "--speed", "0", **client(server))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{SHORT_TEXT}\n", "")


def test_live_takes_a_base_url_with_v1_and_a_language(server: Server) -> None:
    options = ["--speed", "0", "--language", "en", "--base-url", f"{server.url}/v1/", "--api-key", server.key]
    assert command("live", SHORT, *options).stdout == f"{SHORT_TEXT}\n"


def test_live_takes_as_long_as_the_speech_unless_it_is_told_otherwise(server: Server) -> None:
    begun = time.monotonic()
    assert command("live", SPEECH, **client(server)).stdout == f"{TEXT}\n"
    assert time.monotonic() - begun >= 3.0


def test_live_reads_samples_from_the_standard_input(server: Server) -> None:
    done = piped(server, raw())
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"{SHORT_TEXT}\n", b"")


def test_live_sends_what_it_is_told_the_input_is(server: Server) -> None:
    whole = raw(SPEECH)
    eight = b"".join(whole[at : at + 2] for at in range(0, len(whole), 4))  # each other sample
    stereo = b"".join(eight[at : at + 2] * 2 for at in range(0, len(eight), 2))
    done = piped(server, stereo, "--encoding", "pcm_s16le", "--sample-rate", "8000", "--channels", "2")
    assert (done.returncode, done.stderr) == (0, b"")
    assert word_errors(TEXT, done.stdout.decode()) <= 0.5


def test_live_sends_a_file_as_it_is(server: Server, tmp_path: Path) -> None:
    (tmp_path / "speech.raw").write_bytes(raw())
    done = command("live", tmp_path / "speech.raw", "--encoding", "pcm_s16le", "--speed", "0", **client(server))
    assert (done.returncode, done.stdout) == (0, f"{SHORT_TEXT}\n")
    done = command("live", DATA / "a-opus.opus", "--encoding", "opus", **client(server))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_live_prints_every_message_as_json(server: Server) -> None:
    done = command("live", SHORT, "--json", "--speed", "0", **client(server))
    assert (done.returncode, done.stderr) == (0, "")
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert [message["sequence"] for message in messages] == list(range(len(messages)))
    # What comes faster than it is spoken may be over before there is anything to show of it.
    assert {message["type"] for message in messages} - {"partial"} == {"ready", "final", "done"}
    assert (messages[0]["type"], messages[-1]["type"], messages[-1]["text"]) == ("ready", "done", SHORT_TEXT)


def test_live_shows_what_it_hears_on_a_terminal_and_wipes_it(server: Server) -> None:
    mine, its = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")}
    command = [sys.executable, "-m", "voxgate", "live", str(SPEECH), "--speed", "4"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=its, text=True, timeout=60, check=True, env=clean | client(server)
    )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(mine, 100_000):
            shown += chunk
    os.close(mine)
    assert done.stdout == f"{TEXT}\n"
    assert shown.decode().endswith("\r\x1b[K")
    assert "weather" in shown.decode()


def test_live_of_silence_says_nothing(server: Server) -> None:
    done = piped(server, bytes(64_000))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = piped(server, b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing.wav", "missing.wav: No such file"),
        (str(DATA / "not-pdf.pdf"), "not-pdf.pdf: Unrecognized file format: this is a PDF"),
        (str(DATA / "empty.bin"), "empty.bin: "),
        (str(DATA / "noaudio.mp4"), "noaudio.mp4: The file has no audio track."),
        (str(DATA), "data: Is a directory"),
    ],
    ids=["missing", "no-audio-file", "empty", "no-track", "directory"],
)
def test_live_says_in_one_line_what_is_wrong_with_a_file(server: Server, file: str, message: str) -> None:
    done = command("live", file, **client(server))
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ([], {}, "set VOXGATE_API_KEY"),
        ([], {"VOXGATE_API_KEY": "vg_wrong"}, "it may be cut off or mistyped. (401 unauthenticated)"),
        (["--base-url", "http://127.0.0.1:9"], {"VOXGATE_API_KEY": "x"}, "http://127.0.0.1:9 cannot be reached"),
        (["--base-url", "nonsense"], {"VOXGATE_API_KEY": "x"}, "nonsense is no gateway's address"),
        (["--base-url", "http://127.0.0.1:port"], {"VOXGATE_API_KEY": "x"}, "is no gateway's address"),
        (["--model", "no-such-model"], {"VOXGATE_API_KEY": "good"}, "no-such-model"),
        (["--language", "klingon"], {"VOXGATE_API_KEY": "good"}, "klingon"),
        (["--encoding", "mulaw", "--sample-rate", "1"], {"VOXGATE_API_KEY": "good"}, "sample_rate"),
        (["--encoding", "opus"], {"VOXGATE_API_KEY": "good"}, "must be Ogg or WebM"),
    ],
    ids=["no-key", "wrong-key", "no-server", "no-url", "no-port", "model", "language", "rate", "no-opus"],
)
def test_a_mistake_in_live_is_one_line_on_stderr_and_a_failing_status(
    server: Server, options: list[str], environment: dict[str, str], message: str
) -> None:
    environment = {name: server.key if value == "good" else value for name, value in environment.items()}
    done = command("live", SPEECH, *options, **({"VOXGATE_BASE_URL": server.url} | environment))
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_live_that_is_interrupted_ends_in_order_and_prints_what_was_said(server: Server, source: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")}
    command = [
        sys.executable,
        "-m",
        "voxgate",
        "live",
        "--json",
        str(DATA / "long-slt.flac") if source == "file" else "-",
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean | client(server)
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if source == "pipe":
            process.stdin.write(raw(SPEECH, 2.0))
            process.stdin.flush()
        messages = [json.loads(process.stdout.readline())]
        while messages[-1]["type"] != "partial":
            messages.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGINT)
        messages += map(json.loads, process.stdout.read().splitlines())
        told = process.stderr.read().decode()
        assert process.wait(30) == 0
    assert messages[-1]["type"] == "done"
    assert messages[-1]["text"]
    assert told == ""


def test_live_whose_reader_has_seen_enough_does_not_blame_the_gateway(server: Server) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")}
    command = [sys.executable, "-m", "voxgate", "live", str(SPEECH), "--speed", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean | client(server))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 1


@pytest.mark.parametrize("speed", ["-1", "nan", "inf", "fast"])
def test_live_refuses_a_speed_that_is_none(server: Server, speed: str) -> None:
    done = voxgate("live", SPEECH, "--speed", speed, **client(server))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--speed" in done.stderr
