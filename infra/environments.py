"""Where Voxgate is deployed and how large: the one place to change before a deployment.

Checked when it is loaded: a value that cannot work is an `InvalidEnvironment` that names it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

MIB = 1024 * 1024
# API Gateway hands Lambda at most 6 MB, in which 4 MiB of audio are 5.6 MB of base64 beside the headers.
_LARGEST_CUT = 4 * MIB
_LOG_DAYS = (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653)


class InvalidEnvironment(ValueError):
    """The message names the environment and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """`name` is what customers call, in the Route 53 zone `zone_name` of that id."""

    name: str
    zone_name: str
    zone_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """`memory` in MiB. `reserved_concurrency` None shares the account's."""

    memory: int = 1769  # one whole vCPU
    timeout_seconds: int = 29  # API Gateway gives up then
    reserved_concurrency: int | None = None
    requests_per_second: int = 200  # the backstop: customers' own limits are the application's
    burst: int = 400
    canary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingress:
    """Fargate tasks: `cpu` in units of 1/1024 vCPU, `memory` in MiB, `scratch` in GiB."""

    cpu: int = 1024
    memory: int = 2048
    scratch: int = 30
    fewest: int = 1
    most: int = 4
    requests_per_task: int = 100  # a minute, at which another task is started
    idle_seconds: int = 600  # of a stream; a load balancer keeps none for longer than 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """GPU instances of a kind. `fewest` 0 lets them all go when nothing is to be done."""

    instance_type: str = "g6.xlarge"
    fewest: int = 1
    most: int = 4
    model: str = "large-v3-turbo"
    queued_seconds: int = 120  # of audio for each instance, at which another one is started


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """`account` None: the one of the credentials that deploy. `ingress` None deploys the Lambda path
    alone, `inference` None upstream providers alone. `cut` is the `Content-Length` in bytes above which an
    upload goes to the ingress; 0 sends it every upload. `provider_secrets` are the names of the providers'
    keys in Secrets Manager, without the environment's prefix. `origin_secret_version` is the id of the version
    of the origin's secret that CloudFront says; None is the first one, until another is put there.
    `restored_table` is the name of one that was restored from a backup, to be used in place of the stack's own."""

    name: str
    account: str | None
    region: str
    zones: tuple[str, ...]
    production: bool = False
    domain: Domain | None = None
    cut: int = _LARGEST_CUT
    api: Api = field(default_factory=Api)
    ingress: Ingress | None = field(default_factory=Ingress)
    inference: Inference | None = field(default_factory=Inference)
    provider_secrets: tuple[str, ...] = ("openai", "groq", "mistral", "deepgram")
    catalog: str = "default"
    requests_per_address: int = 3000  # in five minutes
    origin_secret_version: str | None = None
    restored_table: str | None = None
    log_days: int = 30
    alarm_email: str | None = None

    def __post_init__(self) -> None:
        self._check("name", bool(re.fullmatch(r"[a-z][a-z0-9-]{1,15}", self.name)), "2 to 16 of a-z, 0-9 and '-'")
        self._check("account", self.account is None or bool(re.fullmatch(r"\d{12}", self.account)), "12 digits")
        self._check("region", bool(re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", self.region)), "a region, as eu-central-1")
        self._check(
            "zones",
            2 <= len(set(self.zones)) <= 3
            and len(set(self.zones)) == len(self.zones)
            and all(zone.startswith(self.region) for zone in self.zones),
            "two or three different zones of its region",
        )
        self._check("cut", 0 <= self.cut <= _LARGEST_CUT, f"0 to {_LARGEST_CUT}, which is what Lambda can carry")
        self._check("cut", bool(self.cut) or self.ingress is not None, "more than 0 where there is no ingress")
        self._check("log_days", self.log_days in _LOG_DAYS, f"one of {', '.join(map(str, _LOG_DAYS))}")
        version = self.origin_secret_version
        self._check(
            "origin_secret_version",
            version is None or bool(re.fullmatch(r"[0-9A-Za-z-]{32,64}", version)),
            "the id of a version in Secrets Manager",
        )
        name = self.restored_table
        self._check(
            "restored_table", name is None or bool(re.fullmatch(r"[\w.-]{3,255}", name)), "the name of a table, no ARN"
        )
        self._check("api.timeout_seconds", 1 <= self.api.timeout_seconds <= 29, "1 to 29")
        for name, sizes in (("ingress", self.ingress), ("inference", self.inference)):
            if sizes is not None:
                self._check(f"{name}.fewest", 0 <= sizes.fewest <= sizes.most, "0 to its 'most'")
                self._check(f"{name}.most", sizes.most >= 1, "at least 1")
        if self.ingress is not None:
            # From none nothing brings back the first one: target tracking has no requests to count then.
            self._check("ingress.fewest", self.ingress.fewest >= 1, "at least 1")
            self._check("ingress.idle_seconds", 1 <= self.ingress.idle_seconds <= 4000, "1 to 4000")
        self._check(
            "alarm_email", self.alarm_email is not None or not self.production, "an address in production: who is paged"
        )
        self._check(
            "domain",
            self.domain is None or self.domain.name.endswith(self.domain.zone_name),
            "a name within its zone",
        )

    def _check(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise InvalidEnvironment(f"The environment '{self.name}': {name} must be {what}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """`repository` is the one on GitHub whose workflows deploy, as its OIDC tokens name it: `OWNER/NAME`, or with
    ids, as `OWNER@1/NAME@2`, where GitHub adds them. `region` is where its stack is; the roles in it are global.
    `provider` False where the account has GitHub as an identity provider already, of which it takes only one."""

    repository: str
    region: str = "eu-central-1"
    provider: bool = True

    def __post_init__(self) -> None:
        # In a subject of IAM's, `*` and `?` would let other repositories in.
        if not re.fullmatch(r"[\w-]+(@\d+)?/[\w.-]+(@\d+)?", self.repository, re.ASCII):
            raise InvalidEnvironment("The pipeline: repository must be OWNER/NAME, as GitHub's tokens have it.")


PIPELINE = Pipeline(repository="example/voxgate")

_ACCOUNT = os.environ.get("CDK_DEFAULT_ACCOUNT")

ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        # The cheapest that works: no GPU, no streams; what is larger than the cut is refused.
        Environment(
            name="dev",
            account=_ACCOUNT,
            region="eu-central-1",
            zones=("eu-central-1a", "eu-central-1b"),
            ingress=None,
            inference=None,
            log_days=7,
        ),
        Environment(
            name="staging",
            account=_ACCOUNT,
            region="eu-central-1",
            zones=("eu-central-1a", "eu-central-1b"),
            inference=Inference(fewest=0, most=1),
        ),
        Environment(
            name="prod",
            account=_ACCOUNT,
            region="eu-central-1",
            zones=("eu-central-1a", "eu-central-1b", "eu-central-1c"),
            production=True,
            domain=Domain(name="api.example.com", zone_name="example.com", zone_id="Z0000000EXAMPLE"),
            api=Api(memory=1769, canary=True),
            ingress=Ingress(cpu=2048, memory=4096, fewest=2, most=20),
            inference=Inference(fewest=1, most=8),
            log_days=365,
            alarm_email="oncall@example.com",
        ),
    )
}


def deployed_to(account: str | None) -> tuple[Environment, ...]:
    """Those of an account; None is the one of the credentials."""
    return tuple(one for one in ENVIRONMENTS.values() if one.account == account)


def named(name: str) -> Environment:
    """Raises `InvalidEnvironment`."""
    if name not in ENVIRONMENTS:
        raise InvalidEnvironment(f"There is no environment '{name}'; there are {', '.join(ENVIRONMENTS)}.")
    return ENVIRONMENTS[name]
