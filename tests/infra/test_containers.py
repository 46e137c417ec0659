"""The containers' Dockerfiles: linted, looked at, and their own commands run in plain directories.

No Docker engine is needed. A stage is a directory that stands for `/`; the commands that need root or the
distribution's packages are the only ones left out, and named in `NEEDS_ROOT`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from dockerfile_parse import DockerfileParser

from customers import SPEECH, Customer, Office
from fakes import whisper_model
from fakes.inference import Inference

ROOT = Path(__file__).parents[2]
SERVICES = ["ingress", "inference"]
ALLOWED = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
NEEDS_ROOT = ("apt-get ", "groupadd ")
# What a stage's commands call by its place in the image, here a place under the stage's directory.
PLACES = re.compile(r"(?<![\w./-])/(venv|app|build|scratch|models)\b")
PORT = "8080"


@dataclass
class Stage:
    """One `FROM` and what follows it, as pairs of instruction and value."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]


def read(service: str) -> tuple[list[str], list[Stage]]:
    """The build arguments before the first stage, and the stages."""
    path = ROOT / "functions" / service / "Dockerfile"
    parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
    arguments: list[str] = []
    stages: list[Stage] = []
    for line in parser.structure:
        instruction, value = line["instruction"], line["value"]
        if instruction == "FROM":
            base, _, name = value.partition(" AS ")
            stages.append(Stage(base, name))
        elif instruction != "COMMENT" and not stages:
            arguments.append(value)
        elif instruction != "COMMENT":
            stages[-1].steps.append((instruction, value))
    return arguments, stages


@pytest.mark.parametrize("service", SERVICES)
def test_the_linter_finds_nothing(service: str) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    path = ROOT / "functions" / service / "Dockerfile"
    done = subprocess.run([linter, "--no-color", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_the_image_runs_as_nobody_in_particular_and_says_how_it_is(service: str) -> None:
    *_, last = read(service)[1]
    assert last.values("USER") == ["10001:10001"], "by number, so that a host can see that it is not root"
    assert last.values("VOLUME") == ["/scratch"]
    assert last.values("STOPSIGNAL") == ["SIGTERM"]
    assert last.values("EXPOSE") == [PORT]
    [command] = last.values("CMD")
    assert json.loads(command)[:2] == ["python", "-m"], "no shell stands between the signal and the server"
    [health] = last.values("HEALTHCHECK")
    assert json.loads(health[health.index("[") :])[:2] == ["python", "-c"]
    order = [name for name, _ in last.steps]
    assert order.index("USER") > max(index for index, name in enumerate(order) if name in ("RUN", "COPY"))
    environment = dict(pair.split("=", 1) for value in last.values("ENV") for pair in shlex.split(value))
    assert environment["VOXGATE_SPOOL_DIR"] == environment["TMPDIR"] == "/scratch"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("service", SERVICES)
def test_every_base_has_a_version_and_can_be_given_by_digest(service: str) -> None:
    arguments, stages = read(service)
    defaults = dict(argument.split("=", 1) for argument in arguments)
    image, _, tag = defaults["BASE"].partition(":")
    assert image
    assert re.match(r"\d+\.\d+", tag), "not 'latest', and nothing that means it"
    names = {stage.name for stage in stages if stage.name}
    bases = {stage.base for stage in stages} - names
    assert bases <= {"${BASE}", "weights-${WEIGHTS}"}


@pytest.mark.parametrize("service", SERVICES)
def test_the_image_holds_no_secret_and_nothing_that_is_not_in_the_context(service: str) -> None:
    _, stages = read(service)
    text = (ROOT / "functions" / service / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"(?i)secret|passw|token|api_?key|credential", text)
    assert "ADD" not in {name for stage in stages for name, _ in stage.steps}
    for stage in stages:
        for value in stage.values("COPY"):
            if value.startswith("--from="):
                assert value.split()[0].removeprefix("--from=") in {other.name for other in stages}
                continue
            for source in value.split()[:-1]:
                assert any(source == place or source.startswith(f"{place}/") for place in ALLOWED), source
                assert source.startswith("weights/") or (ROOT / source).exists(), source


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_installed_is_locked_by_hash_and_what_the_tests_ran_with(service: str) -> None:
    lock = (ROOT / "functions" / service / "requirements.lock").read_text(encoding="utf-8")
    tested = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    names = re.findall(r"^([\w.-]+==[\w.]+)", lock, re.MULTILINE)
    assert names
    assert [name for name in names if f"\n{name}" not in f"\n{tested}"] == []
    assert len(names) == len(re.findall(r"^[\w.-]+==.*\\\n    --hash=sha256:", lock, re.MULTILINE))
    installs = [step for stage in read(service)[1] for step in stage.values("RUN") if "pip install" in step]
    assert len(installs) == 1
    assert "--require-hashes" in installs[0]
    assert "--only-binary=:all:" in installs[0]


class Build:
    """A build in `directory`, each stage a directory in it. `python` is the base's interpreter."""

    def __init__(self, service: str, directory: Path, *, python: str, context: Path, **arguments: str) -> None:
        self.service = service
        self._context = context
        self._given = arguments
        globals_, self._stages = read(service)
        self._defaults = dict(argument.split("=", 1) for argument in globals_) | arguments
        self._directory = directory
        self._built: dict[str, Path] = {}
        self.environment: dict[str, str] = {}
        base = directory / "base" / "bin"
        base.mkdir(parents=True)
        for name in ("python", "python3"):
            (base / name).symlink_to(python)
        self._path = f"{base}:{os.environ['PATH']}"

    def run(self) -> Path:
        """The last stage's directory."""
        return self._stage(self._stages[-1])

    def _stage(self, stage: Stage) -> Path:
        key = stage.name or "last"
        if key in self._built:
            return self._built[key]
        base = self._substituted(stage.base, self._defaults)
        root = self._directory / key
        below = next((other for other in self._stages if other.name == base), None)
        if below is not None:
            shutil.copytree(self._stage(below), root, symlinks=True, copy_function=os.link)
        root.mkdir(exist_ok=True)
        self._built[key] = root
        variables: dict[str, str] = {}
        where = root
        for instruction, value in stage.steps:
            if instruction == "ARG":
                name, _, default = value.partition("=")
                variables[name] = self._given.get(name, default)
            elif instruction == "WORKDIR":
                where = self._inside(root, value)
                where.mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                self._copy(self._substituted(value, variables).split(), root, where)
            elif instruction == "RUN" and not any(command in value for command in NEEDS_ROOT):
                self._command(value, root, where, variables)
            elif instruction == "VOLUME":
                self._inside(root, value).mkdir()
            elif instruction == "ENV":
                for pair in shlex.split(value):
                    name, _, text = pair.partition("=")
                    text = self._substituted(text, variables | {"PATH": os.environ["PATH"]})
                    self.environment[name] = PLACES.sub(rf"{root}/\1", text)
        self.where = where
        return root

    def _copy(self, words: list[str], root: Path, where: Path) -> None:
        origin = self._context
        if words[0].startswith("--from="):
            name = words.pop(0).removeprefix("--from=")
            origin = self._stage(next(stage for stage in self._stages if stage.name == name))
        *sources, target = words
        to = self._inside(root, target) if target.startswith("/") else where / target
        for source in sources:
            path = origin / source.lstrip("/")
            if path.is_dir():
                self._copy_tree(path, to, from_context=origin == self._context)
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, to)

    @staticmethod
    def _copy_tree(source: Path, target: Path, *, from_context: bool) -> None:
        """`__pycache__` is not in the context, and very much in the stages, whose files are linked for speed."""
        if from_context:
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copytree(source, target, symlinks=True, copy_function=os.link)

    def _command(self, value: str, root: Path, where: Path, variables: dict[str, str]) -> None:
        command = PLACES.sub(rf"{root}/\1", value)
        done = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=where,
            env=os.environ | variables | {"PATH": self._path},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 and "Retrying (" in done.stderr:
            pytest.skip("no package index can be reached, and the image is made of its wheels")
        assert done.returncode == 0, f"{command}\n{done.stderr}"

    @staticmethod
    def _inside(root: Path, path: str) -> Path:
        return root / path.lstrip("/")

    @staticmethod
    def _substituted(text: str, variables: dict[str, str]) -> str:
        return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda match: variables[match[1] or match[2]], text)


@dataclass(frozen=True)
class Container:
    url: str
    root: Path
    process: subprocess.Popen[bytes]
    log: Path
    healthy: Callable[[], int]


@contextmanager
def started(build: Build, **environment: str) -> Iterator[Container]:
    """The image's own start command, with the image's environment, on a free port."""
    root = build.run()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    last = read(build.service)[1][-1]
    command = [port if word == PORT else word for word in json.loads(last.values("CMD")[0])]
    [health] = last.values("HEALTHCHECK")
    probe = [word.replace(f":{PORT}/", f":{port}/") for word in json.loads(health[health.index("[") :])]
    variables = build.environment | environment
    log = root.parent / "log"

    def healthy() -> int:
        return subprocess.run(in_path(probe), env=variables, check=False, capture_output=True, timeout=60).returncode

    def in_path(words: list[str]) -> list[str]:
        found = shutil.which(words[0], path=variables["PATH"])
        assert found is not None
        assert Path(found).is_relative_to(root), "the image's own Python"
        return [found, *words[1:]]

    with log.open("wb") as output:
        process = subprocess.Popen(in_path(command), cwd=build.where, env=variables, stdout=output, stderr=output)
    try:
        yield Container(f"http://127.0.0.1:{port}", root, process, log, healthy)
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, container: Container) -> httpx.Response:
    deadline = time.monotonic() + 120
    while True:
        assert container.process.poll() is None, container.log.read_text(encoding="utf-8")
        try:
            response = httpx.get(url)
            if response.status_code == 200:
                return response
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, container.log.read_text(encoding="utf-8")
        time.sleep(0.1)


def stopped(container: Container) -> int:
    container.process.send_signal(signal.SIGTERM)
    return container.process.wait(60)


def files_of(root: Path) -> set[Path]:
    """Everything but the volume."""
    return {path for path in root.rglob("*") if root / "scratch" not in (path, *path.parents)}


def post(url: str, key: str | None = None, **form: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    with SPEECH.open("rb") as audio:
        files = {"file": (SPEECH.name, audio)}
        return httpx.post(f"{url}/v1/audio/transcriptions", headers=headers, data=form, files=files, timeout=120)


class _Bucket(BaseHTTPRequestHandler):
    """As much of S3 as it takes to fetch what is staged."""

    def do_GET(self) -> None:
        content = SPEECH.read_bytes() if self.path == "/voxgate/staging/acct/req" else b""
        self.send_response(200 if content else 404)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def bucket() -> Iterator[dict[str, str]]:
    """The environment of a container that has one, as the template gives it, and its role's credentials."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        credentials = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "eu-central-1"}
        yield credentials | {
            "VOXGATE_STAGING_BUCKET": "voxgate",
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.server_port}",
        }
        server.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Half a gigabyte that pytest would keep for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def python_for(version: str) -> str:
    """The base's Python where it is at hand, or else this one, which the lock is for too."""
    found = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [*([found] if found else []), *(str(path) for path in pyenv.glob(f"versions/{version}.*/bin/python"))]
    for candidate in candidates:
        if subprocess.run([candidate, "-c", "import venv"], check=False, capture_output=True).returncode == 0:
            return candidate
    return sys.executable


def test_the_ingress_image_transcribes_and_ends_in_order(place: Path) -> None:
    data = place / "data"
    data.mkdir()
    customer: Customer = Office(data).open(credit=10**9)
    build = Build("ingress", place / "image", python=python_for("3.13"), context=ROOT)
    before = files_of(build.run())
    with Inference() as upstream:
        outside = {"VOXGATE_DATA_DIR": str(data), "VOXGATE_INFERENCE_URL": upstream.url}
        with started(build, **outside) as container:
            assert wait_for(f"{container.url}/health/live", container).json()["status"] == "ok"
            assert container.healthy() == 0
            response = post(container.url, customer.key, model="whisper-1")
            assert (response.status_code, response.json()["text"][:5]) == (200, "heard")
            assert stopped(container) == 0, container.log.read_text(encoding="utf-8")
            assert container.healthy() != 0
    assert files_of(build.run()) == before, "the root may be read-only"
    assert list((container.root / "scratch").iterdir()) == []


def test_the_inference_image_hears_with_the_weights_it_was_built_with(place: Path) -> None:
    context = place / "context"
    (context / "functions").parent.mkdir()
    (context / "functions").symlink_to(ROOT / "functions")
    weights = whisper_model.build(context / "weights" / "tiny-random") / "model.bin"
    build = Build(
        "inference",
        place / "image",
        python=python_for("3.12"),
        context=context,
        WEIGHTS="directory",
        WHISPER_MODEL="tiny-random",
        WHISPER_SHA256=hashlib.sha256(weights.read_bytes()).hexdigest(),
    )
    before = files_of(build.run())
    assert build.environment["VOXGATE_WHISPER_MODEL"] == "tiny-random"
    whisper = {"VOXGATE_WHISPER_DEVICE": "cpu", "VOXGATE_WHISPER_BATCH": "1"}
    with bucket() as address, started(build, **whisper, **address) as container:
        assert wait_for(f"{container.url}/health/live", container).json()["status"] == "ok"
        wait_for(f"{container.url}/health/ready", container)
        assert container.healthy() == 0
        response = post(container.url, model="tiny-random", language="en")
        assert response.status_code == 200, response.text
        form = {"model": "tiny-random", "language": "en", "s3": "s3://voxgate/staging/acct/req"}
        staged = httpx.post(f"{container.url}/v1/audio/transcriptions", files={n: (None, v) for n, v in form.items()})
        assert (staged.status_code, staged.json()["usage"]) == (200, response.json()["usage"]), staged.text
        assert "tiny-random" in [model["id"] for model in httpx.get(f"{container.url}/v1/models").json()["data"]]
        assert stopped(container) == 0, container.log.read_text(encoding="utf-8")
    assert files_of(build.run()) == before, "the root may be read-only"
    assert list((container.root / "scratch").iterdir()) == []


def weigh(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "functions" / "voxgate" / "weights.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


def test_weights_that_were_not_expected_stop_the_build(tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "vocabulary.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "model.bin").write_bytes(b"weights")
    assert weigh("check", str(tmp_path), hashlib.sha256(b"weights").hexdigest()).returncode == 0
    for expected in (hashlib.sha256(b"others").hexdigest(), ""):
        (tmp_path / "model.bin").write_bytes(b"weights")
        done = weigh("check", str(tmp_path), expected)
        assert done.returncode == 1
        assert "has the SHA-256" in done.stderr


def test_a_name_that_is_not_pinned_is_not_fetched(tmp_path: Path) -> None:
    done = weigh("fetch", "anything", str(tmp_path))
    assert done.returncode == 1
    assert "none of large-v3-turbo" in done.stderr
