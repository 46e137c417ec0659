"""The workflows, as GitHub reads them, and the roles that they take on."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.app import build_pipeline
from infra.environments import ENVIRONMENTS, PIPELINE, InvalidEnvironment, Pipeline, deployed_to
from synthesized import Templates, shown

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOW = GITHUB / "workflows" / "pipeline.yml"
DEPLOY = GITHUB / "actions" / "deploy" / "action.yml"
ORDER = ("dev", "staging", "prod")
ISSUER = "token.actions.githubusercontent.com"


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.fixture
def jobs() -> dict[str, Any]:
    found: dict[str, Any] = read(WORKFLOW)["jobs"]
    assert list(found) == ["checks", "synth", "diff", *ORDER]
    return found


@pytest.fixture
def deploying() -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = read(DEPLOY)["runs"]["steps"]
    return steps


@pytest.mark.parametrize(("schema", "file"), [("github-workflows", WORKFLOW), ("github-actions", DEPLOY)])
def test_the_files_are_what_github_takes(schema: str, file: Path) -> None:
    command = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*command, str(file)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_no_workflow_besides() -> None:
    assert sorted(file for file in GITHUB.rglob("*") if file.is_file()) == [DEPLOY, WORKFLOW]


def test_every_action_of_others_is_pinned_by_its_commit() -> None:
    """And says of which release it is. One action, one commit."""
    commits: dict[str, set[str]] = {}
    for file in (WORKFLOW, DEPLOY):
        for line in re.findall(r"^.*\buses:.*$", file.read_text(encoding="utf-8"), re.MULTILINE):
            if "uses: ./" in line:
                continue
            pinned = re.fullmatch(r" *-? *uses: ([\w-]+/[\w-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", line)
            assert pinned is not None, line
            commits.setdefault(pinned[1], set()).add(pinned[2])
    assert "aws-actions/configure-aws-credentials" in commits
    assert [name for name, found in commits.items() if len(found) > 1] == []


def test_only_a_pull_request_and_main_start_it() -> None:
    """YAML takes the key `on` for true. `pull_request_target` would have main's rights on a stranger's code."""
    assert read(WORKFLOW)[True] == {"pull_request": None, "push": {"branches": ["main"]}}


def test_a_job_has_no_right_that_it_does_not_need(jobs: dict[str, Any]) -> None:
    assert read(WORKFLOW)["permissions"] == {}
    read_only, with_token = {"contents": "read"}, {"contents": "read", "id-token": "write"}
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "checks": read_only,
        "synth": read_only,
        "diff": {"id-token": "write"},
        **dict.fromkeys(ORDER, with_token),
    }


def test_a_checkout_leaves_no_token_behind(jobs: dict[str, Any]) -> None:
    steps = [step for job in jobs.values() for step in job["steps"] if "actions/checkout@" in step.get("uses", "")]
    assert len(steps) == 5
    assert all(step["with"]["persist-credentials"] is False for step in steps)


def test_a_pull_request_from_a_fork_meets_neither_a_secret_nor_a_role(jobs: dict[str, Any]) -> None:
    assert "github.event.pull_request.head.repo.full_name == github.repository" in jobs["diff"]["if"]
    for name in ("checks", "synth"):
        assert "secrets" not in json.dumps(jobs[name])
        assert "aws-actions" not in json.dumps(jobs[name])
    assert "secrets" not in json.dumps(jobs["diff"])
    assert jobs["dev"]["if"].startswith("github.event_name == 'push' &&")  # and the others come after it
    # No key of AWS is stored anywhere.
    stored = {name for file in (WORKFLOW, DEPLOY) for name in re.findall(r"secrets\.(\w+)", file.read_text())}
    assert stored == {"SMOKE_API_KEY"}


def test_a_comparison_runs_nothing_of_the_pull_requests(jobs: dict[str, Any]) -> None:
    """Who may ask for a token could take on the role."""
    steps = jobs["diff"]["steps"]
    assert not [step for step in steps if "actions/checkout@" in step.get("uses", "")]
    (command,) = [step["run"] for step in steps if "run" in step]
    assert command.startswith('npx --yes "$CDK" diff --app assembly --method=template')
    assert jobs["diff"]["needs"] == "synth"


def test_every_environment_is_synthesized_and_compared(jobs: dict[str, Any]) -> None:
    for name in ("synth", "diff"):
        assert jobs[name]["strategy"]["matrix"]["environment"] == list(ENVIRONMENTS)


def test_what_is_checked_goes_to_one_environment_after_the_other(jobs: dict[str, Any]) -> None:
    assert tuple(ENVIRONMENTS) == ORDER
    assert {name: jobs[name]["needs"] for name in ORDER} == {
        "dev": ["checks", "synth"],
        "staging": "dev",
        "prod": "staging",
    }


@pytest.mark.parametrize("name", ORDER)
def test_a_deployment_is_of_the_environment_of_its_name_one_at_a_time(jobs: dict[str, Any], name: str) -> None:
    """In the environment's settings on GitHub are the branches that may, who approves, and the smoke test's key."""
    job = jobs[name]
    assert job["environment"] == name
    assert job["concurrency"] == {"group": f"deploy-{name}"}  # and none is cut off in the middle
    step = job["steps"][-1]
    assert step["uses"] == "./.github/actions/deploy"
    assert step["with"]["environment"] == "${{ github.job }}"
    assert step["with"].keys() == read(DEPLOY)["inputs"].keys()


def test_nothing_runs_for_ever(jobs: dict[str, Any]) -> None:
    assert all(0 < job["timeout-minutes"] <= 120 for job in jobs.values())


def test_a_deployment_is_strict_and_tried_afterwards(deploying: list[dict[str, Any]]) -> None:
    names = [step.get("name", step.get("id", step.get("uses", "").partition("@")[0])) for step in deploying]
    assert names[-4:] == ["Synthesize", "aws", "Deploy", "Smoke test"]
    _, role, deploy, smoke = deploying[-4:]
    assert " --strict " in deploy["run"]
    assert smoke["run"].rstrip().endswith('.venv/bin/voxgate smoke --base-url "$url" --api-key "$VOXGATE_API_KEY"')
    # The role's credentials are in the environment of that one step.
    assert role["with"]["output-env-credentials"] is False
    assert [step["name"] for step in deploying if "AWS_SECRET_ACCESS_KEY" in step.get("env", {})] == ["Deploy"]


def test_nothing_from_outside_is_pasted_into_a_script(jobs: dict[str, Any], deploying: list[dict[str, Any]]) -> None:
    """An expression in a script is text before the shell reads it; in a variable it is a value."""
    steps = [*deploying, *(step for job in jobs.values() for step in job["steps"])]
    scripts = [step["run"] for step in steps if "run" in step]
    assert len(scripts) == 7
    assert not [script for script in scripts if "${{" in script]


def test_lambdas_python_is_there_for_the_bytecode(jobs: dict[str, Any], deploying: list[dict[str, Any]]) -> None:
    wanted = re.findall(r'^python = "(.+)"', (ROOT / "layers/dependencies/platform.toml").read_text(), re.MULTILINE)
    for steps in (jobs["checks"]["steps"], jobs["synth"]["steps"], deploying):
        (python,) = [step for step in steps if "actions/setup-python@" in step.get("uses", "")]
        assert python["with"]["python-version"].split()[:-1] == wanted  # the last is the one that `python3` is


# The roles.


def roles(pipeline: Templates) -> dict[str, Any]:
    return {role["RoleName"]: role for role in pipeline.properties("IAM::Role")}


def test_each_role_is_for_its_own_jobs_of_this_repository(pipeline: Templates) -> None:
    subjects = {f"voxgate-deploy-{name}": f"environment:{name}" for name in ORDER} | {"voxgate-diff": "pull_request"}
    found = roles(pipeline)
    assert found.keys() == subjects.keys()
    for name, role in found.items():
        (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
        assert trust["Action"] == "sts:AssumeRoleWithWebIdentity"
        assert trust["Principal"].keys() == {"Federated"}
        assert trust["Condition"] == {
            "StringEquals": {
                f"{ISSUER}:aud": "sts.amazonaws.com",
                f"{ISSUER}:sub": f"repo:{PIPELINE.repository}:{subjects[name]}",
            }
        }
        assert not role.get("ManagedPolicyArns")


def test_the_workflows_name_the_roles_that_there_are(pipeline: Templates) -> None:
    named = re.findall(r":role/(voxgate-\S+)", WORKFLOW.read_text() + DEPLOY.read_text())
    assert named == ["voxgate-diff", "voxgate-deploy-${{"]
    assert {name.removesuffix("${{") for name in named} == {
        re.sub(f"({'|'.join(ORDER)})$", "", name) for name in roles(pipeline)
    }


def test_who_deploys_takes_on_the_bootstraps_roles_and_may_nothing_else(pipeline: Templates) -> None:
    for name, environment in ENVIRONMENTS.items():
        policy = pipeline.one("IAM::Policy", name=f"Deploy{name.capitalize()}")
        (statement,) = policy["PolicyDocument"]["Statement"]
        assert (statement["Effect"], statement["Action"]) == ("Allow", "sts:AssumeRole")
        kinds = {"deploy", "file-publishing", "lookup"}
        wanted = {(kind, region) for kind in kinds for region in (environment.region, "us-east-1")}
        if environment.ingress or environment.inference:
            wanted.add(("image-publishing", environment.region))
        assert {shown(one) for one in statement["Resource"]} == {
            f"arn:aws:iam::<AWS::AccountId>:role/cdk-hnb659fds-{kind}-role-<AWS::AccountId>-{region}"
            for kind, region in wanted
        }


def test_who_compares_may_read_the_templates_of_the_stacks(pipeline: Templates) -> None:
    (statement,) = pipeline.one("IAM::Policy", name="Diff")["PolicyDocument"]["Statement"]
    assert statement["Action"] == ["cloudformation:DescribeStacks", "cloudformation:GetTemplate"]
    assert {shown(one) for one in statement["Resource"]} == {
        f"arn:aws:cloudformation:{'us-east-1' if stack == 'Front' else one.region}:<AWS::AccountId>"
        f":stack/Voxgate-{one.name}-{stack}/*"
        for one in ENVIRONMENTS.values()
        for stack in ("Data", "Front", "Service")
    }


def test_an_account_has_the_roles_of_its_own_environments(tmp_path: Path) -> None:
    """And one that knows GitHub already keeps that, since it takes it only once."""
    account = "111111111111"
    own = dataclasses.replace(ENVIRONMENTS["prod"], account=account)
    pipeline = dataclasses.replace(PIPELINE, provider=False)
    build_pipeline(pipeline, account=account, deployed=[own], outdir=tmp_path).synth()
    template = json.loads((tmp_path / "Voxgate-Pipeline.template.json").read_text(encoding="utf-8"))
    kinds = [resource["Type"].removeprefix("AWS::IAM::") for resource in template["Resources"].values()]
    assert sorted(kinds) == ["Policy", "Policy", "Role", "Role"]
    assert f'"arn:aws:iam::{account}:oidc-provider/{ISSUER}"' in json.dumps(template)


def test_the_environments_of_an_account_are_found_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(ENVIRONMENTS["prod"], account="222222222222")
    monkeypatch.setitem(ENVIRONMENTS, "prod", other)
    assert deployed_to("222222222222") == (other,)
    assert other not in deployed_to(ENVIRONMENTS["dev"].account)


@pytest.mark.parametrize("repository", ["voxgate", "example/*", "example/voxgate:ref", "", "example/voxgate\n"])
def test_a_repository_that_could_be_another_is_refused(repository: str) -> None:
    with pytest.raises(InvalidEnvironment, match="OWNER/NAME"):
        Pipeline(repository=repository)


@pytest.mark.parametrize("repository", ["example/voxgate", "example@123456/vox.gate@456789"])
def test_a_repository_is_named_as_githubs_tokens_do(repository: str) -> None:
    assert Pipeline(repository=repository).repository == repository
