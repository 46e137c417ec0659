"""The templates of an environment, as the CDK app makes them, for tests to look into."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.app import build, build_pipeline
from infra.environments import ENVIRONMENTS, PIPELINE, Environment

Resource = Mapping[str, Any]
STACKS = ("Data", "Front", "Service")


@dataclass(frozen=True, slots=True, kw_only=True)
class Templates:
    """`templates` are by the names of their stacks, without the environment's prefix."""

    directory: Path
    templates: Mapping[str, Mapping[str, Any]]

    def all(self, kind: str) -> Iterator[tuple[str, Resource]]:
        """Every resource of a kind, as `S3::Bucket`, by its stack and logical id."""
        for stack, template in self.templates.items():
            for name, resource in template["Resources"].items():
                if resource["Type"] == f"AWS::{kind}":
                    yield f"{stack}/{name}", resource

    def properties(self, kind: str, *, name: str = "") -> list[Mapping[str, Any]]:
        """Of those whose logical id has `name` in it."""
        return [resource.get("Properties", {}) for found, resource in self.all(kind) if name in found]

    def one(self, kind: str, *, name: str = "") -> Mapping[str, Any]:
        (found,) = self.properties(kind, name=name)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesized(Templates):
    """Of one environment."""

    environment: Environment


def synthesize_pipeline(directory: Path) -> Templates:
    """What an account has once, for all environments."""
    deployed = [dataclasses.replace(one, account=None) for one in ENVIRONMENTS.values()]
    build_pipeline(PIPELINE, account=None, deployed=deployed, outdir=directory).synth()
    file = directory / "Voxgate-Pipeline.template.json"
    return Templates(directory=directory, templates={"Pipeline": json.loads(file.read_text(encoding="utf-8"))})


def synthesize(environment: Environment, directory: Path) -> Synthesized:
    """Without the dependency layer, which takes a minute. What is there already is read."""
    directory.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker's may be on its way
        whole = directory.with_suffix(".whole")
        if not whole.exists():
            build(environment, outdir=directory, bundle=False).synth()
            whole.touch()
    files = {stack: directory / f"Voxgate-{environment.name}-{stack}.template.json" for stack in STACKS}
    return Synthesized(
        environment=environment,
        directory=directory,
        templates={stack: json.loads(file.read_text(encoding="utf-8")) for stack, file in files.items()},
    )


def shown(value: Any) -> str:
    """A resource's ARN or name in a template, for people: without what CDK adds to tell names apart."""
    match value:
        case str():
            return value
        case {"Fn::Join": [separator, parts]}:
            return str(separator).join(map(shown, parts))
        case {"Ref": name}:
            return f"<{_plain(name)}>"
        case {"Fn::GetAtt": [name, attribute]}:
            return f"<{_plain(name)}.{attribute}>"
        case {"Fn::ImportValue": name}:
            kept = re.fullmatch(
                r"Voxgate-.*?-(\w+):ExportsOutput(?:Ref|FnGetAtt)(.*?)[0-9A-F]{8}(\w*?)[0-9A-F]{8}", name
            )
            assert kept is not None, name
            return f"<{kept[1]}/{kept[2]}{'.' if kept[3] else ''}{kept[3]}>"
    return json.dumps(value, sort_keys=True)


def _plain(logical_id: str) -> str:
    return re.sub(r"(?<=[a-z0-9])[0-9A-F]{8}$", "", logical_id)
