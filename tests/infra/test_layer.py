"""What Lambda runs, as it is deployed: the layer and the asset, built, looked at, and run."""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from customers import LITELLM, OPENAI, ROUTER, SPEECH, STATS, Office
from fakes.inference import Inference
from make_events import BOUNDARY, events, form

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "layers" / "dependencies" / "build.py"
LOCK = ROOT / "layers" / "dependencies" / "requirements.lock"
PLATFORM: dict[str, Any] = tomllib.loads((SCRIPT.parent / "platform.toml").read_text(encoding="utf-8"))
PROXY_EVENT: dict[str, Any] = json.loads((Path(__file__).parent / "data/apigateway-aws-proxy.json").read_bytes())
LARGEST = 200_000_000
AARCH64 = 183  # ELF's e_machine
# What the asset imports and the layer lacks: some is the runtime's own; the rest is of other hosts, and is
# imported where they are chosen.
RUNTIMES = {"boto3", "botocore", "snapshot_restore_py"}
OTHER_HOSTS = {"uvicorn", "httptools", "websockets", "rich", "numpy", "pocketsphinx"}
OTHER_HOSTS |= {"faster_whisper", "ctranslate2", "huggingface_hub"}
FOR_MYPY = {"mypy_boto3_dynamodb", "mypy_boto3_s3", "mypy_boto3_secretsmanager"}


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


INTERPRETER: str | None = _script().interpreter_for(PLATFORM["python"])


def build(what: str, directory: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(directory), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode != 0 and "Retrying (" in done.stderr:
        pytest.skip("no package index can be reached, and the layer is made of its wheels")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@dataclass(frozen=True)
class Built:
    layer: Path
    functions: Path
    size: int


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """For Lambda's platform; without bytecode where there is no Python of its version to make it."""
    directory = tmp_path_factory.mktemp("lambda")
    options = [] if INTERPRETER else ["--without-bytecode"]
    layer = build("layer", directory / "layer", *options)
    functions = build("functions", directory / "functions", *options)
    yield Built(directory / "layer" / "python", directory / "functions", layer["bytes"] + functions["bytes"])
    shutil.rmtree(directory)  # pytest would keep it for three runs


def installed(packages: Path) -> list[Distribution]:
    return list(distributions(path=[str(packages)]))


def test_the_layer_has_what_the_lock_names_and_nothing_else(deployed: Built) -> None:
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line]
    locked = {tuple(line.split(" ")[0].split(";")[0].split("==")) for line in lines}
    assert {
        (found.metadata["Name"].lower().replace("_", "-"), found.version) for found in installed(deployed.layer)
    } == locked


def test_layer_and_functions_fit_with_room_for_others(deployed: Built) -> None:
    on_disk = sum(path.stat().st_size for path in deployed.layer.parents[1].rglob("*") if path.is_file())
    assert deployed.size == on_disk < LARGEST


def test_the_asset_has_the_functions_and_not_the_containers_code(deployed: Built) -> None:
    assert sorted(path.name for path in deployed.functions.iterdir()) == ["api", "sweep", "voxgate"]
    assert (deployed.functions / "voxgate" / "catalog" / "default.toml").is_file()


def test_every_module_that_the_functions_import_is_there_by_name(deployed: Built) -> None:
    wanted: set[str] = set()
    for source in deployed.functions.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted.add(node.module.split(".")[0])
    wanted -= sys.stdlib_module_names | {"voxgate"}
    missing = {name for name in wanted if PathFinder.find_spec(name, [str(deployed.layer)]) is None}
    assert missing == RUNTIMES | OTHER_HOSTS | FOR_MYPY


def test_every_compiled_module_is_for_lambdas_processor_and_python(deployed: Built) -> None:
    libraries = [path for path in deployed.layer.rglob("*.so*") if path.is_file()]
    assert {"pydantic_core", "pybase64", "av", "av.libs"} <= {
        path.relative_to(deployed.layer).parts[0] for path in libraries
    }
    assert PLATFORM["architecture"] == "aarch64"
    for path in libraries:
        assert struct.unpack_from("<H", path.read_bytes()[:20], 18)[0] == AARCH64, path
        if ".cpython-" in path.name:
            assert f".cpython-{PLATFORM['python'].replace('.', '')}-aarch64-linux-gnu." in path.name


def test_nothing_is_there_that_only_a_build_needs(deployed: Built) -> None:
    unused = (".pyi", ".pyx", ".pxd", ".c", ".h")
    assert [path for path in deployed.layer.rglob("*") if path.name == "tests" or path.suffix in unused] == []


@pytest.mark.skipif(INTERPRETER is None, reason=f"there is no Python {PLATFORM['python']} here to compile with")
def test_every_source_has_bytecode_of_lambdas_python_that_is_taken_unchecked(deployed: Built) -> None:
    assert INTERPRETER is not None
    ask = "import importlib.util as u, sys; sys.stdout.write(u.MAGIC_NUMBER.hex())"
    magic = bytes.fromhex(subprocess.check_output([INTERPRETER, "-I", "-c", ask], text=True))
    tag = f"cpython-{PLATFORM['python'].replace('.', '')}"
    for root, place in ((deployed.layer, b"/opt/python/"), (deployed.functions, b"/var/task/")):
        for source in root.rglob("*.py"):
            code = (source.parent / "__pycache__" / f"{source.stem}.{tag}.pyc").read_bytes()
            assert code[:4] == magic, source
            assert struct.unpack_from("<I", code, 4)[0] == 1, "PEP 552: by hash, unchecked"
            assert place + str(source.relative_to(root)).encode() in code, "what a traceback says"


def test_two_builds_are_the_same(deployed: Built, tmp_path: Path) -> None:
    build("functions", tmp_path, *([] if INTERPRETER else ["--without-bytecode"]))
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (deployed.functions, tmp_path)
    )
    assert first == second


def test_a_python_that_is_missing_is_said_with_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "functions", str(tmp_path / "x"), "--python", "3.99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no Python 3.99 here" in done.stderr
    assert "--without-bytecode" in done.stderr
    assert not (tmp_path / "x").exists()


# Everything that runs in a clean interpreter: no site-packages, and nothing of this repository but the asset.
RUN = """
import importlib, json, os, sys
layer, functions = sys.argv[1:]
sys.path[:0] = [functions, layer]

class Context:
    function_name = "voxgate"
    memory_limit_in_mb = 1769
    invoked_function_arn = "arn:aws:lambda:eu-central-1:123456789012:function:voxgate"
    aws_request_id = "52fdfc07-2182-154f-163f-5f0f9a621d72"
    def get_remaining_time_in_millis(self):
        return 29_000

out, sys.stdout = sys.stdout, sys.stderr
handler = importlib.import_module("api.handler").handler
answers = {name: handler(event, Context()) for name, event in json.load(sys.stdin).items()}
swept = importlib.import_module("sweep.handler").handler({}, Context())
loaded = [m.__spec__ for m in list(sys.modules.values()) if getattr(m, "__spec__", None) and m.__spec__.origin]
ours = [spec for spec in loaded if spec.origin.startswith((layer, functions))]
json.dump({
    "answers": answers,
    "swept": swept,
    "foreign": [s.origin for s in loaded if s not in ours and "-packages" in s.origin],
    "uncompiled": [s.origin for s in ours if s.origin.endswith(".py") and not os.path.exists(s.cached or "")],
}, out)
out.flush()
os._exit(0)
"""
STATUS = {
    "error-no-key": 401, "error-wrong-key": 401, "error-not-audio": 400, "error-no-file": 400,
    "error-unknown-model": 404, "error-cut-off": 400, "error-binary-media-types": 400, "error-wrong-path": 404,
    "error-wrong-method": 405, "proxy": 404,
}  # fmt: skip


def proxy_event(path: str, body: bytes, key: str) -> dict[str, Any]:
    """SAM's example of what API Gateway sends, as an upload."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return PROXY_EVENT | {
        "path": path,
        "body": base64.b64encode(body).decode(),
        "pathParameters": {"proxy": path.removeprefix("/")},
        "headers": PROXY_EVENT["headers"] | headers,
        "multiValueHeaders": PROXY_EVENT["multiValueHeaders"] | {name: [value] for name, value in headers.items()},
    }


def all_events(key: str) -> dict[str, dict[str, Any]]:
    ours = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "events").glob("*.json")}
    assert set(ours) == set(events()), "make_events.py makes them all"
    proxies = {"proxy": PROXY_EVENT}
    for path in (OPENAI, STATS, ROUTER, LITELLM):
        audio, model = ("audio", "model_id") if path == STATS else ("file", "model")
        body = form({model: "whisper-1"}, ("a.mp3", SPEECH.read_bytes()), audio)
        proxies[f"proxy {path}"] = proxy_event(path, body, key)
    return {name: json.loads(text.replace("${VOXGATE_API_KEY}", key)) for name, text in ours.items()} | proxies


@pytest.mark.skipif(sys.platform != "linux", reason="the lock's wheels are chosen for Linux here")
@pytest.mark.parametrize("which", ["this Python", "the runtime's Python"])
def test_the_handler_answers_from_layer_and_asset_alone(which: str, tmp_path: Path) -> None:
    python, options = sys.executable, ["--here"]
    if which == "the runtime's Python":
        if INTERPRETER is None:
            pytest.skip(f"there is no Python {PLATFORM['python']} here to run it with")
        python, options = INTERPRETER, ["--architecture", platform.machine()]
    build("layer", tmp_path / "layer", *options)
    build("functions", tmp_path / "functions", *options)
    before = sorted(path for path in tmp_path.rglob("*"))
    data = tmp_path / "data"
    data.mkdir()
    customer = Office(data).open(credit=10**9)
    given = all_events(customer.key)
    with Inference() as upstream:
        done = subprocess.run(
            [python, "-I", "-S", "-c", RUN, str(tmp_path / "layer" / "python"), str(tmp_path / "functions")],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={
                "VOXGATE_DATA_DIR": str(data),
                "VOXGATE_SPOOL_DIR": str(data / "spool"),
                "VOXGATE_INFERENCE_URL": upstream.url,
                "POWERTOOLS_METRICS_NAMESPACE": "Voxgate",
                "PATH": os.defpath,
            },
        )
    assert done.returncode == 0, done.stderr[-5000:]
    outcome = json.loads(done.stdout)
    assert {name: answer["statusCode"] for name, answer in outcome["answers"].items()} == {
        name: STATUS.get(name, 200) for name in given
    }
    for name in (f"proxy {OPENAI}", "openai", "openai-verbose", "litellm"):
        assert json.loads(outcome["answers"][name]["body"])["text"].startswith("heard ")
    assert set(outcome["swept"].values()) == {0}
    assert outcome["foreign"] == []
    assert outcome["uncompiled"] == []
    after = sorted(path for path in tmp_path.rglob("*") if data not in (path, *path.parents))
    assert after == before, "nothing was compiled at the start"
    shutil.rmtree(tmp_path)
