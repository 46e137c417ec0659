from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.environments import ENVIRONMENTS, InvalidEnvironment, named
from synthesized import STACKS, Synthesized

INFRA = Path(__file__).parents[2] / "infra"


def test_each_environment_is_three_stacks_which_need_neither_an_account_nor_a_look_up(each: Synthesized) -> None:
    manifest = json.loads((each.directory / "manifest.json").read_text(encoding="utf-8"))
    stacks = {
        name: artifact["environment"]
        for name, artifact in manifest["artifacts"].items()
        if artifact["type"] == "aws:cloudformation:stack"
    }
    regions = dict.fromkeys(STACKS, each.environment.region) | {"Front": "us-east-1"}
    assert stacks == {
        f"Voxgate-{each.environment.name}-{stack}": f"aws://unknown-account/{region}"
        for stack, region in regions.items()
    }
    assert "missing" not in manifest


def test_an_environment_without_ingress_and_inference_has_no_network_and_no_container(dev: Synthesized) -> None:
    assert not [kind for kind in ("EC2::VPC", "ECS::Service", "CloudFront::VpcOrigin") if [*dev.all(kind)]]
    assert "VpcConfig" not in dev.one("Lambda::Function", name="ApiHost")


def test_every_store_of_the_production_environment_outlives_its_stack(prod: Synthesized) -> None:
    kinds = ("DynamoDB::Table", "S3::Bucket", "KMS::Key", "SecretsManager::Secret")
    stateful = {name: resource for kind in kinds for name, resource in prod.all(kind) if name.startswith("Data/")}
    assert len(stateful) == 8
    for name, resource in stateful.items():
        assert (resource["DeletionPolicy"], resource["UpdateReplacePolicy"]) == ("Retain", "Retain"), name


def test_every_resource_that_can_have_tags_says_whose_it_is(each: Synthesized) -> None:
    for name, bucket in each.all("S3::Bucket"):
        tags = {tag["Key"]: tag["Value"] for tag in bucket["Properties"]["Tags"]}
        assert tags["service"] == "voxgate", name
        assert tags["environment"] == each.environment.name, name


def test_an_unknown_environment_is_told_which_there_are() -> None:
    with pytest.raises(InvalidEnvironment, match=r"no environment 'qa'; there are dev, staging, prod\."):
        named("qa")


def test_the_cli_of_cdk_synthesizes_by_the_command_in_cdk_json(tmp_path: Path) -> None:
    """The CLI runs that command in `infra/`, and passes the context and the directory in variables."""
    interpreter, *arguments = json.loads((INFRA / "cdk.json").read_text(encoding="utf-8"))["app"].split()
    assert interpreter == "../.venv/bin/python"
    context = json.dumps({"env": "staging", "aws:cdk:bundling-stacks": []})
    subprocess.run(
        [sys.executable, *arguments],
        cwd=INFRA,
        env={**os.environ, "CDK_CONTEXT_JSON": context, "CDK_OUTDIR": str(tmp_path)},
        check=True,
    )
    assert (tmp_path / "Voxgate-staging-Service.template.json").exists()


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("fewest", 0, r"ingress\.fewest must be at least 1"),
        ("idle_seconds", 4001, r"ingress\.idle_seconds must be 1 to 4000"),
        ("idle_seconds", 0, r"ingress\.idle_seconds must be 1 to 4000"),
    ],
)
def test_an_ingress_that_cannot_work_is_refused_when_it_is_written_down(field: str, value: int, what: str) -> None:
    sizes = ENVIRONMENTS["prod"].ingress
    assert sizes is not None
    with pytest.raises(InvalidEnvironment, match=what):
        dataclasses.replace(ENVIRONMENTS["prod"], ingress=dataclasses.replace(sizes, **{field: value}))


def test_every_environment_can_be_named_for_a_synthesis() -> None:
    assert set(ENVIRONMENTS) == {"dev", "staging", "prod"}
