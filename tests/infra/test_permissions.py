"""What runs may do all that it does, and nothing besides.

The hosts run on moto as production's templates deploy them: with their environment variables, and on tables,
buckets and secrets of the names that those give. What they call is held against the statements of their roles.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import uvicorn
from moto import mock_aws

from conftest import DATA
from customers import CONTRACTS, OPENAI, ROUTER, SPEECH, send
from fakes.api_gateway import ApiGateway
from fakes.inference import Inference
from fakes.upstreams import KEY, DeepgramUpstream, MistralUpstream, OpenAIUpstream
from permissions import Deployed, Need, Needs, Recorder, Right, missing, spare
from synthesized import Synthesized
from voxgate.accounts import NO_LIMITS, Bounds, Entry, EntryKind, Key, Scope, Ticket, keys
from voxgate.accounts.dynamodb import DynamoStore
from voxgate.hosts.inference import build_inference
from voxgate.hosts.serve import bind, url
from voxgate.settings import Settings
from voxgate.staging import audio_key
from voxgate.wiring import build_pool, make_spool

ROOT = Path(__file__).parents[2]
CATALOG = (ROOT / "functions" / "voxgate" / "catalog" / "default.toml").read_text(encoding="utf-8")
UPSTREAMS = {
    "https://api.openai.com/v1": OpenAIUpstream,
    "https://api.groq.com/openai/v1": OpenAIUpstream,
    "https://api.mistral.ai/v1": MistralUpstream,
    "https://api.deepgram.com": DeepgramUpstream,
}
STAGED = bool(tomllib.loads(CATALOG)["providers"]["self"].get("staged"))
# What no call of ours asks for, by why it is given all the same.
BY_LAMBDA = {
    "Lambda writes the function's log with the function's role.": {"logs:CreateLogStream", "logs:PutLogEvents"},
    "Lambda sends the function's traces with its role.": {"xray:PutTraceSegments", "xray:PutTelemetryRecords"},
}
IN_NETWORK = {
    "Lambda makes the function's network interfaces with its role.": {
        "ec2:CreateNetworkInterface",
        "ec2:DeleteNetworkInterface",
        "ec2:DescribeNetworkInterfaces",
        "ec2:DescribeSubnets",
    }
}


@dataclass
class Cloud:
    """An environment that is deployed to moto, with a customer, a recognizer and providers."""

    deployed: Deployed
    synthesized: Synthesized
    needs: Needs
    recorder: Recorder
    inference: Inference
    upstreams: dict[str, Any]
    directory: Path
    table: str
    bucket: str
    key: str = ""
    account: str = ""

    def variables(self, stack: str, given: Any) -> dict[str, str]:
        """As the template has them; only the volume and the catalogue's addresses are others."""
        found = self.deployed.variables(stack, given)
        for name in ("VOXGATE_SPOOL_DIR", "TMPDIR"):
            if name in found:
                found[name] = str(self.directory / "scratch")
        return found

    def catalog(self, *, staged: bool) -> str:
        """The deployment's, with the addresses of providers that stand here."""
        text = CATALOG
        for address, upstream in self.upstreams.items():
            assert f'"{address}"' in text
            text = text.replace(f'"{address}"', f'"{upstream.base_url}"')
        self_ = '[providers.self]\nkind = "inference"\n'
        assert self_ in text
        if staged and "staged = true" not in text:
            text = text.replace(self_, f"{self_}staged = true\n")
        path = self.directory / "catalog.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def asked(self) -> set[Need]:
        return self.needs.of(self.recorder.calls)


@pytest.fixture
def cloud(prod: Synthesized, tmp_path: Path) -> Iterator[Cloud]:
    with on_moto(prod, tmp_path) as cloud:
        yield cloud


@contextlib.contextmanager
def on_moto(synthesized: Synthesized, directory: Path) -> Iterator[Cloud]:
    region = synthesized.environment.region
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        credentials = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": region}
        stack.enter_context(surroundings(credentials | {"POWERTOOLS_LOG_LEVEL": "CRITICAL"}))
        stack.enter_context(mock_aws())
        stack.enter_context(recorder.running())
        inference = stack.enter_context(Inference())
        upstreams = {address: stack.enter_context(kind()) for address, kind in UPSTREAMS.items()}
        known = {
            f"{name}.DNSName": inference.url.removeprefix("http://")
            for name, _ in synthesized.all("ElasticLoadBalancingV2::LoadBalancer")
            if "Inference" in name
        }
        secrets = {}
        for name, secret in synthesized.all("SecretsManager::Secret"):
            # Whose name is not given gets one of CloudFormation's.
            called = secret["Properties"].get("Name", name)
            stored = boto3.client("secretsmanager").create_secret(Name=called, SecretString=KEY)
            known[name] = secrets[called] = stored["ARN"]
        for name, _ in synthesized.all("S3::Bucket"):
            known[name] = name.replace("/", "-").lower()[:63]
        deployed = Deployed(synthesized, known)
        table = deployed.named("DynamoDB::Table", "Data/")
        properties = synthesized.one("DynamoDB::Table")
        boto3.client("dynamodb").create_table(
            TableName=table, **{name: properties[name] for name in ("KeySchema", "AttributeDefinitions", "BillingMode")}
        )
        (bucket,) = [
            known[name]
            for name, _ in synthesized.all("S3::Bucket")
            if name.startswith("Data/DataStaging") and "Log" not in name
        ]
        here: Any = {"LocationConstraint": region}
        boto3.client("s3").create_bucket(Bucket=bucket, CreateBucketConfiguration=here)
        needs = Needs(region, secrets, deployed.encrypted())
        (directory / "scratch").mkdir()
        made = Cloud(deployed, synthesized, needs, recorder, inference, upstreams, directory, table, bucket)
        asyncio.run(furnish(made))
        yield made


async def furnish(cloud: Cloud) -> None:
    """A customer, by an operator whose rights are their own."""
    store = DynamoStore(cloud.table)
    cloud.key = keys.generate()
    account = await store.create_account("acme")
    cloud.account = account.id
    await store.post(Entry(account.id, EntryKind.TOP_UP, 10**9, time.time(), "opening"))
    key = Key(id="key_1", account_id=account.id, created=0, scopes=frozenset(Scope))
    await store.create_key(key, keys.digest(cloud.key))
    await store.close()


_BEGUN: list[Any] = []  # Lambda ends a process without closing what it has open; these end with this one


def started(name: str) -> Any:
    """A function's or container's own module, begun anew."""
    spec = importlib.util.spec_from_file_location(f"begun.{name.replace('/', '.')}", ROOT / "functions" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _BEGUN.append(module)
    return module


@contextlib.contextmanager
def surroundings(variables: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield url(listening)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextlib.contextmanager
def api(cloud: Cloud, *, staged: bool = False) -> Iterator[httpx.Client]:
    function = cloud.synthesized.one("Lambda::Function", name="ApiHost")
    variables = cloud.variables("Service", function["Environment"]["Variables"])
    variables |= {"VOXGATE_CATALOG": cloud.catalog(staged=staged), "VOXGATE_SPOOL_DIR": str(cloud.directory / "tmp")}
    with surroundings(variables), cloud.recorder.acting():
        handler = started(function["Handler"].replace(".", "/").removesuffix("/handler")).handler
        with httpx.Client(base_url="https://api", headers=bearer(cloud), transport=ApiGateway(handler)) as client:
            yield client


@contextlib.contextmanager
def ingress(cloud: Cloud, *, staged: bool = False) -> Iterator[httpx.Client]:
    variables = cloud.variables("Service", container(cloud, "Ingress")["Environment"])
    variables["VOXGATE_CATALOG"] = cloud.catalog(staged=staged)
    with (
        surroundings(variables),
        cloud.recorder.acting(),
        served(started("ingress/main").app) as address,
        httpx.Client(base_url=address, headers=bearer(cloud), timeout=60) as client,
    ):
        yield client


def container(cloud: Cloud, name: str) -> Any:
    (only,) = cloud.synthesized.one("ECS::TaskDefinition", name=f"Service/{name}")["ContainerDefinitions"]
    return only


def bearer(cloud: Cloud) -> dict[str, str]:
    return {"authorization": f"Bearer {cloud.key}"}


def use(cloud: Cloud, client: httpx.Client) -> None:
    """A spread of what customers do."""
    for path in CONTRACTS.values():
        assert send(client, path, response_format="json").status_code == 200
    for model in ("gpt-4o-transcribe", "deepgram-nova-3", "voxtral-mini"):
        assert send(client, model=model).status_code == 200, model
    groq = send(client, ROUTER, model="whisper-large-v3-turbo", allowed_providers="groq")
    assert (groq.status_code, groq.headers["x-voxgate-provider"]) == (200, "groq")
    for text, key in (("short", "one"), ("long " * 100_000, "two")):
        cloud.inference.text = text
        headers = {"idempotency-key": key}
        answers = [_own(client, headers) for _ in range(2)]
        assert answers[1].headers["idempotency-replayed"] == "true", answers[1].text[:500]
        assert answers[0].content == answers[1].content
    cloud.inference.text = "heard"
    remembered = [_own(client, {"x-voxgate-cache": "read-write"}) for _ in range(2)]
    assert remembered[0].json()["text"] == remembered[1].json()["text"]
    for status in (500, 500, 500, 500, 500, 500):  # until it is said to be out of order
        cloud.inference.status = status
        assert _own(client, {"idempotency-key": "three"}).status_code == 502
    cloud.inference.status = 200
    assert send(client, audio=b"no audio").status_code == 400
    assert client.get("/v1/balance", headers={"authorization": f"Bearer {keys.generate()}"}).status_code == 401
    for path in ("/v1/balance", "/v1/usage", "/v1/models", "/v1/models/whisper-1", "/v1/providers", "/health"):
        assert client.get(path).status_code == 200, path


def _own(client: httpx.Client, headers: dict[str, str]) -> httpx.Response:
    return client.post(
        OPENAI, data={"model": "embedded"}, files={"file": ("a.mp3", SPEECH.read_bytes())}, headers=headers
    )


Host = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


@pytest.mark.parametrize(
    ("host", "role", "explained"),
    [(api, "ApiHostRole", BY_LAMBDA | IN_NETWORK), (ingress, "IngressTaskTaskRole", {})],
    ids=["api", "ingress"],
)
def test_a_gateway_may_do_what_it_does_and_no_more(
    cloud: Cloud, host: Host, role: str, explained: dict[str, set[str]]
) -> None:
    with host(cloud) as client:
        use(cloud, client)
    rights, asked = cloud.deployed.rights(role), cloud.asked()
    assert missing(rights, asked) == []
    left = spare(rights, asked)
    staged = {right for right in left if right.resource.endswith("/staging/*")}
    assert {(right.action, right.resource.split(":::")[1]) for right in staged} == (
        # A catalogue whose `self` is staged, which an operator may choose: the next test has one.
        set() if STAGED else {(f"s3:{verb}Object", f"{cloud.bucket}/staging/*") for verb in ("Put", "Delete")}
    )
    assert {right.action for right in left if right not in staged} == {
        one for some in explained.values() for one in some
    }


@pytest.mark.parametrize(
    ("host", "role"), [(api, "ApiHostRole"), (ingress, "IngressTaskTaskRole")], ids=["api", "ingress"]
)
def test_a_gateway_that_stages_may_put_and_remove_what_it_stages(cloud: Cloud, host: Host, role: str) -> None:
    with host(cloud, staged=True) as client:
        assert send(client, model="embedded").status_code == 200
    rights, asked = cloud.deployed.rights(role), cloud.asked()
    assert missing(rights, asked) == []
    assert {need.action for need in asked if "/staging/" in need.resource} == {"s3:PutObject", "s3:DeleteObject"}
    assert not [right for right in spare(rights, asked) if right.resource.endswith("/staging/*")]


def test_an_environment_without_inference_serves_by_its_providers_alone(dev: Synthesized, tmp_path: Path) -> None:
    with on_moto(dev, tmp_path) as small:
        with api(small) as client:
            assert send(client, model="whisper-1").headers["x-voxgate-provider"] == "openai"
            assert _own(client, {}).status_code == 404
            assert client.get("/v1/balance").status_code == 200
        assert missing(small.deployed.rights("ApiHostRole"), small.asked()) == []


def test_the_sweeper_may_give_back_and_audit_and_no_more(cloud: Cloud) -> None:
    asyncio.run(die(cloud))
    function = cloud.synthesized.one("Lambda::Function", name="SweeperHost")
    with surroundings(cloud.variables("Service", function["Environment"]["Variables"])), cloud.recorder.acting():
        handler = started(function["Handler"].replace(".", "/").removesuffix("/handler")).handler
        for given in inputs(cloud.synthesized):
            said = handler(given, None)
            assert said == (
                {"accounts": 1, "differences": 0} if given.get("task") else {"holds": 1, "amount": 500, "slots": 1}
            )
    rights, asked = cloud.deployed.rights("SweeperHostRole"), cloud.asked()
    assert missing(rights, asked) == []
    assert {right.action for right in spare(rights, asked)} == {one for some in BY_LAMBDA.values() for one in some}


async def die(cloud: Cloud) -> None:
    """A request whose process ended yesterday."""
    store = DynamoStore(cloud.table, clock=lambda: time.time() - 86_400)
    ticket = Ticket("req_dead", cloud.account, "key_1", (Bounds(cloud.account, NO_LIMITS),))
    await store.admit(ticket, lease=60)
    await store.hold(ticket, 500, tenths=31, lease=60)
    await store.close()


def inputs(synthesized: Synthesized) -> list[dict[str, Any]]:
    """What the schedules hand to the function, the sweep first."""
    targets = [target for rule in synthesized.properties("Events::Rule") for target in rule["Targets"]]
    found = [json.loads(target.get("Input", "{}")) for target in targets]
    assert sorted(map(str, found)) == ["{'task': 'audit'}", "{}"]
    return sorted(found, key=len)


def test_the_inference_service_may_read_what_is_staged_and_no_more(cloud: Cloud) -> None:
    """With the recognizer that ships, in place of Whisper on a GPU."""
    variables = cloud.variables("Service", container(cloud, "Inference")["Environment"])
    variables = {name: value for name, value in variables.items() if not name.startswith("VOXGATE_WHISPER_")}
    variables["VOXGATE_ENGINE_WORKERS"] = "1"
    key = audio_key(cloud.account, "req_1")
    silence = (DATA / "silence.flac").read_bytes()
    boto3.client("s3").put_object(Bucket=cloud.bucket, Key=key, Body=silence)
    with surroundings(variables), cloud.recorder.acting():
        settings = Settings.from_environment()
        pool, spool = build_pool(settings), make_spool(settings.spool_dir)
        app = build_inference(pool=pool, models=["pocketsphinx"], settings=settings, spool_dir=spool)
        with served(app) as address:
            form = {"model": (None, "default"), "s3": (None, f"s3://{cloud.bucket}/{key}")}
            answer = httpx.post(f"{address}{OPENAI}", files=form, timeout=60)
    assert answer.status_code == 200, answer.text
    rights, asked = cloud.deployed.rights("InferenceTaskTaskRole"), cloud.asked()
    assert missing(rights, asked) == []
    assert spare(rights, asked) == []


def test_the_key_of_the_deployment_encrypts_what_is_stored(cloud: Cloud) -> None:
    with api(cloud) as client:
        assert _own(client, {"x-voxgate-cache": "read-write"}).status_code == 200
    (put,) = [call.parameters for call in cloud.recorder.calls if call.operation == "PutObject"]
    assert (put["ServerSideEncryption"], put["SSEKMSKeyId"]) == (
        "aws:kms",
        cloud.deployed.encrypted()[f"arn:aws:s3:::{cloud.bucket}"],
    )


# That the tests above can fail.


def test_a_right_that_is_taken_away_is_missing_and_one_too_many_is_spare(cloud: Cloud) -> None:
    with api(cloud) as client:
        assert client.get("/v1/balance").status_code == 200
    rights, asked = cloud.deployed.rights("ApiHostRole"), cloud.asked()
    used = rights - set(spare(rights, asked))
    assert {right.action for right in used} >= {"dynamodb:GetItem", "dynamodb:BatchGetItem", "kms:Decrypt"}
    for right in used:
        assert missing(rights - {right}, asked), f"{right} is asked for"
    more = Right("dynamodb:Scan", next(iter(used)).resource)
    assert more in spare(rights | {more}, asked)


NEED = Need("s3:GetObject", "arn:aws:s3:::b/staging/a/r", (("kms:ViaService", "s3.eu-central-1.amazonaws.com"),))


@pytest.mark.parametrize(
    ("right", "allowed"),
    [
        (Right("s3:GetObject", "arn:aws:s3:::b/staging/*"), True),
        (Right("s3:Get*", "*"), True),
        (Right("s3:GetObject", "arn:aws:s3:::b/staging/a/?"), True),
        (Right("s3:GetObject", "arn:aws:s3:::b/staging/"), False),
        (Right("s3:GetObject", "arn:aws:s3:::b/results/*"), False),
        (Right("s3:GetObject", "arn:aws:s3:::B/staging/*"), False),
        (Right("s3:GetObject", "arn:aws:s3:::b/staging/[a]/r"), False),
        (Right("s3:PutObject", "*"), False),
        (Right("s3:GetObject", "*", (("kms:ViaService", "s3.eu-central-1.amazonaws.com"),)), True),
        (Right("s3:GetObject", "*", (("kms:ViaService", "dynamodb.eu-central-1.amazonaws.com"),)), False),
        (Right("s3:GetObject", "*", (("s3:prefix", "staging/"),)), False),
    ],
    ids=str,
)
def test_a_right_is_judged_by_action_resource_and_conditions(right: Right, allowed: bool) -> None:
    assert right.allows(NEED) is allowed
