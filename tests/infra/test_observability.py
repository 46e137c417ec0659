"""Whoever is on call is paged for what customers feel, and for money; and nothing is watched that nobody reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from container_stack import Resource, environment, synthesized
from infra.constructs.metrics import NAMESPACE, REPORTED
from voxgate import metering

NAMES = ["dev", "staging", "prod"]
ALWAYS = {
    "ServerErrors",
    "ApiSlow",
    "NoProvider",
    "LedgerDiffers",
    "LedgerUnclosed",
    "SweeperLate",
    "SweeperFails",
    "AuditLate",
}


def pages(name: str) -> dict[str, Resource]:
    """The alarms of the construct, by the last part of their names."""
    found = {k: a for k, a in synthesized(name).all("CloudWatch::Alarm").items() if k.startswith("Observability")}
    return {alarm["AlarmName"].rsplit("-", 1)[-1]: alarm for alarm in found.values()}


def shown(name: str) -> str:
    """The dashboard's body, as one text."""
    body = synthesized(name).one("CloudWatch::Dashboard")["DashboardBody"]["Fn::Join"][1]
    return "".join(part if isinstance(part, str) else json.dumps(part) for part in body)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_an_alarm_for_each_thing_that_customers_feel_where_it_can_happen(name: str) -> None:
    chosen = environment(name)
    wanted = ALWAYS | ({"IngressSlow"} if chosen.ingress else set()) | ({"QueueLong"} if chosen.inference else set())
    assert set(pages(name)) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_every_alarm_pages_tells_when_it_is_over_and_says_what_it_means(name: str) -> None:
    for alarm in pages(name).values():
        assert "ObservabilityPages" in str(alarm["AlarmActions"])
        assert "ObservabilityPages" in str(alarm["OKActions"])
        assert len(alarm["AlarmDescription"]) > 40


@pytest.mark.parametrize("name", NAMES)
def test_silence_is_an_alarm_for_what_runs_on_a_schedule_alone(name: str) -> None:
    loud = {key for key, alarm in pages(name).items() if alarm["TreatMissingData"] == "breaching"}
    assert loud == {"SweeperLate", "AuditLate"}
    assert {a["TreatMissingData"] for k, a in pages(name).items() if k not in loud} == {"notBreaching"}


def test_server_errors_are_counted_on_both_paths_also_where_no_task_is_left_to_count() -> None:
    (expression, *metrics) = pages("prod")["ServerErrors"]["Metrics"]
    counted = {metric["MetricStat"]["Metric"]["MetricName"] for metric in metrics}
    assert counted == {"5XXError", "Count", "HTTPCode_ELB_5XX_Count", "HTTPCode_Target_5XX_Count", "RequestCount"}
    used = set(re.findall(r"FILL\((\w+), 0\)", expression["Expression"]))
    assert used == {metric["Id"] for metric in metrics}
    alone = pages("dev")["ServerErrors"]["Metrics"]
    assert {m["MetricStat"]["Metric"]["MetricName"] for m in alone[1:]} == {"5XXError", "Count"}


def test_any_difference_in_the_ledger_pages_at_once() -> None:
    alarm = pages("prod")["LedgerDiffers"]
    assert (alarm["Threshold"], alarm["ComparisonOperator"]) == (0, "GreaterThanThreshold")
    assert (alarm["Statistic"], alarm["EvaluationPeriods"]) == ("Maximum", 1)


def test_a_day_without_an_audit_is_none_but_half_another_one_is_too_much() -> None:
    alarm = pages("prod")["AuditLate"]
    assert (alarm["MetricName"], alarm["Statistic"]) == ("LedgerDifference", "SampleCount")
    assert (alarm["Threshold"], alarm["ComparisonOperator"]) == (1, "LessThanThreshold")
    assert alarm["Period"] * alarm["EvaluationPeriods"] == 36 * 3600
    assert alarm["DatapointsToAlarm"] == alarm["EvaluationPeriods"]


@pytest.mark.parametrize("name", NAMES)
def test_every_alarm_has_its_line_in_the_operators_manual(name: str) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    for alarm in synthesized(name).all("CloudWatch::Alarm"):
        called = re.sub(r"^Observability|^Api|[0-9A-F]{8}$", "", alarm)
        if "TaskCount" not in alarm:  # those of the scaling, which page nobody
            assert f"`{called}`" in manual, called


@pytest.mark.parametrize("name", NAMES)
def test_alarms_and_dashboard_ask_for_metrics_that_the_runtime_has_to_report(name: str) -> None:
    asked = {a["MetricName"] for a in pages(name).values() if a.get("Namespace") == NAMESPACE}
    assert asked <= set(REPORTED)
    for alarm in pages(name).values():
        if alarm.get("Namespace") == NAMESPACE:
            assert alarm["Dimensions"] == [{"Name": "environment", "Value": name}]
    searched = set(re.findall(r'MetricName=\\+"(\w+)', shown(name)))
    graphed = set(re.findall(rf'"{NAMESPACE}","(\w+)"', shown(name)))
    assert searched | graphed <= set(REPORTED)
    inference = {"QueuedAudioSeconds", "GpuUtilization", "GpuMemoryUtilization"}
    needed = set(REPORTED) - (inference if environment(name).inference is None else set())
    assert asked | searched | graphed == needed  # and nothing is reported that nobody looks at


@pytest.mark.parametrize("name", NAMES)
def test_the_log_is_searched_for_requests_that_could_not_give_back(name: str) -> None:
    template = synthesized(name)
    filters = template.all("Logs::MetricFilter").values()
    assert len(filters) == (2 if environment(name).ingress else 1)
    # As `metering.py` words it.
    assert {one["FilterPattern"] for one in filters} == {'"is not closed in the ledger"'}
    alarm = pages(name)["LedgerUnclosed"]
    for one in filters:
        (made,) = one["MetricTransformations"]
        assert (made["MetricNamespace"], made["MetricName"]) == (alarm["Namespace"], alarm["MetricName"])


def test_the_words_that_the_filter_looks_for_are_still_what_the_gateway_logs() -> None:
    source = Path(metering.__file__).read_text(encoding="utf-8")
    assert 'logger.exception("request %s is not closed in the ledger"' in source


def test_cloudwatch_may_publish_under_the_topics_own_key_and_nobody_in_the_clear() -> None:
    template = synthesized("prod")
    assert "ObservabilityKey" in str(template.one("SNS::Topic")["KmsMasterKeyId"])
    key = template.one("KMS::Key", "ObservabilityKey")
    assert key["EnableKeyRotation"] is True
    grants = [s for s in key["KeyPolicy"]["Statement"] if s["Principal"] == {"Service": "cloudwatch.amazonaws.com"}]
    assert [set(grant["Action"]) for grant in grants] == [{"kms:Decrypt", "kms:GenerateDataKey"}]
    said = template.one("SNS::TopicPolicy")["PolicyDocument"]["Statement"]
    assert [s["Principal"] for s in said if s["Effect"] == "Allow"] == [{"Service": "cloudwatch.amazonaws.com"}]
    assert [s["Condition"] for s in said if s["Effect"] == "Deny"] == [{"Bool": {"aws:SecureTransport": "false"}}]


def test_production_pages_somebody() -> None:
    page = synthesized("prod").one("SNS::Subscription")
    assert (page["Protocol"], page["Endpoint"]) == ("email", environment("prod").alarm_email)
