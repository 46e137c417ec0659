"""What holds of every template: the rules engines' findings, rights, logs and alarms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aws_cdk import App, Stack
from aws_cdk import aws_sns as sns

from infra.app import judge
from synthesized import Synthesized, Templates, shown

HERE = Path(__file__).parent
GOLDEN = HERE / "roles.json"
RENEW = "RENEW_ROLES=1 .venv/bin/pytest tests/infra/test_rules.py -k golden"


def test_the_rules_engine_finds_nothing_that_has_no_reason(each: Synthesized) -> None:
    report = json.loads((each.directory / "validation-report.json").read_text(encoding="utf-8"))
    assert not [plugin["violations"] for plugin in report["pluginReports"] if plugin["violations"]]


def test_the_rules_engine_stops_a_synthesis(tmp_path: Path) -> None:
    """The test above could not fail otherwise."""
    app = App(outdir=str(tmp_path))
    sns.Topic(Stack(app, "Careless"), "Topic")
    judge(app)
    with pytest.raises(RuntimeError, match="AwsSolutions-SNS3"):
        app.synth()


def test_cfn_lint_finds_nothing_that_has_no_reason(environments: dict[str, Synthesized], pipeline: Templates) -> None:
    made = [one.directory for one in (*environments.values(), pipeline)]
    templates = [str(file) for directory in made for file in directory.glob("*.template.json")]
    assert len(templates) == 10
    command = [
        str(Path(sys.executable).with_name("cfn-lint")),
        "--config-file",
        str(HERE.parents[1] / "infra" / "cfnlint.yaml"),
    ]
    done = subprocess.run([*command, "--", *templates], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_right_is_for_every_action_of_a_service(each: Synthesized) -> None:
    for role, statements in _statements(each).items():
        for statement in statements:
            for action in _listed(statement["Action"]):
                assert "*" not in action, f"{role}: {action}"


def test_every_right_names_its_resource_or_is_one_that_cannot(each: Synthesized) -> None:
    """AWS's reference of actions gives these no resource, or takes none where they are asked for."""
    unbound = {
        "ec2:CreateNetworkInterface",
        "ec2:DeleteNetworkInterface",
        "ec2:DescribeNetworkInterfaces",
        "ec2:DescribeSubnets",
        "ecr:GetAuthorizationToken",
        "ecs:DiscoverPollEndpoint",
        "xray:PutTelemetryRecords",
        "xray:PutTraceSegments",
    }
    for role, statements in _statements(each).items():
        for statement in statements:
            if statement["Resource"] == "*":
                assert set(_listed(statement["Action"])) <= unbound, role


def test_the_golden_file_says_what_each_role_may_do(environments: dict[str, Synthesized], pipeline: Templates) -> None:
    """A review sees there which right a change gives or takes. When it is meant, renew the file: see RENEW."""
    rights = {name: _rights(one) for name, one in {**environments, "pipeline": pipeline}.items()}
    if os.environ.get("RENEW_ROLES"):
        GOLDEN.write_text(json.dumps(rights, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert rights == golden, f"What a role may do has changed. If that is meant, renew tests/infra/roles.json: {RENEW}"


def test_every_log_is_kept_as_long_as_the_environment_says(each: Synthesized) -> None:
    groups = [*each.all("Logs::LogGroup")]
    assert groups
    for name, group in groups:
        assert group["Properties"]["RetentionInDays"] == each.environment.log_days, name


def test_every_function_writes_to_a_log_of_ours(each: Synthesized) -> None:
    """One that Lambda makes by itself is kept for ever."""
    for function in each.properties("Lambda::Function"):
        assert shown(function["LoggingConfig"]["LogGroup"]).endswith("Log>")


def test_every_alarm_tells_somebody(each: Synthesized) -> None:
    alarms = [*each.all("CloudWatch::Alarm")]
    assert alarms
    for name, alarm in alarms:
        assert alarm["Properties"].get("AlarmActions"), name
        assert alarm["Properties"].get("ActionsEnabled", True), name


def test_no_topic_or_queue_is_in_the_clear(each: Synthesized) -> None:
    for name, topic in each.all("SNS::Topic"):
        assert topic["Properties"]["KmsMasterKeyId"], name
    assert not [*each.all("SQS::Queue")]


def _rights(synthesized: Templates) -> dict[str, Any]:
    """Of each role: who takes it on, AWS's policies, and its actions with their resources and conditions."""
    statements = _statements(synthesized)
    rights: dict[str, Any] = {}
    for name, resource in synthesized.all("IAM::Role"):
        properties = resource["Properties"]
        allowed: dict[str, list[str]] = {}
        for statement in statements.get(shown({"Ref": name.partition("/")[2]}), []):
            assert statement["Effect"] == "Allow", name
            for action in _listed(statement["Action"]):
                resources = [shown(one) + _condition(statement) for one in _listed(statement["Resource"])]
                allowed.setdefault(action, []).extend(resources)
        rights[shown({"Ref": name.partition("/")[2]})[1:-1]] = {
            "taken on by": [
                shown(one["Principal"]) + _condition(one) for one in properties["AssumeRolePolicyDocument"]["Statement"]
            ],
            "policies of AWS": [shown(policy) for policy in properties.get("ManagedPolicyArns", [])],
            "may": {action: sorted(resources) for action, resources in allowed.items()},
        }
    return rights


def _condition(statement: Any) -> str:
    return f" if {json.dumps(statement['Condition'], sort_keys=True)}" if "Condition" in statement else ""


def _statements(synthesized: Templates) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for _, policy in synthesized.all("IAM::Policy"):
        for role in policy["Properties"]["Roles"]:
            found.setdefault(shown(role), []).extend(policy["Properties"]["PolicyDocument"]["Statement"])
    for name, role in synthesized.all("IAM::Role"):
        for policy in role["Properties"].get("Policies", []):
            found.setdefault(shown({"Ref": name.partition("/")[2]}), []).extend(policy["PolicyDocument"]["Statement"])
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
