"""How long the Lambda function takes to load, beside one built of the usual parts."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .report import Goal, Report

FUNCTIONS = Path(__file__).parents[2] / "functions"
TARGET = 0.8
ROUNDS = 5
OURS = "import api.handler"
# Measured together, and each alone.
USUAL = {
    "boto3, S3 and DynamoDB clients": 'import boto3; boto3.client("s3"); boto3.client("dynamodb")',
    "Powertools Logger and Metrics": (
        'from aws_lambda_powertools import Logger, Metrics\nLogger(service="x"); Metrics(namespace="x", service="x")'
    ),
    "Powertools APIGatewayRestResolver": (
        "from aws_lambda_powertools.event_handler import APIGatewayRestResolver; APIGatewayRestResolver()"
    ),
    "pydantic and a model": "from pydantic import BaseModel\nclass Form(BaseModel):\n  model: str",
    "httpx.Client": "import httpx; httpx.Client()",
}


def run() -> Report:
    report = Report(
        f"imports: a fresh process each, the median of {ROUNDS}, in turns, ms",
        ("what", "whole process", "less the interpreter"),
    )
    scripts = {"the interpreter alone": "pass", "the function": OURS, "the usual parts": "\n".join(USUAL.values())}
    scripts |= {f"  {name}": code for name, code in USUAL.items()}
    times: dict[str, list[float]] = {name: [] for name in scripts}
    with tempfile.TemporaryDirectory() as directory:
        for round_ in range(ROUNDS + 1):
            for name, code in scripts.items():
                begun = time.perf_counter()
                _python(["-c", code], directory)
                if round_:  # the first compiles
                    times[name].append((time.perf_counter() - begun) * 1000)
        tree = _python(["-X", "importtime", "-c", OURS], directory).stderr
    medians = {name: statistics.median(each) for name, each in times.items()}
    bare = medians["the interpreter alone"]
    report.rows = [(name, median, max(median - bare, 0.0)) for name, median in medians.items()]
    ratio = medians["the function"] / medians["the usual parts"]
    net = (medians["the function"] - bare) / (medians["the usual parts"] - bare)
    report.notes = ["our slowest modules, ms with what they import, by -X importtime:", *_slowest(tree)]
    report.goals = [
        Goal(f"the function by the usual parts, at most {TARGET}", ratio, ratio <= TARGET),
        Goal(f"the same, less the interpreter, at most {TARGET}", net, net <= TARGET),
    ]
    return report


def _python(arguments: list[str], directory: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VOXGATE_", "AWS_", "COV"))}
    environment = inherited | {
        "PYTHONPATH": str(FUNCTIONS),
        "VOXGATE_DATA_DIR": directory,
        "VOXGATE_SPOOL_DIR": f"{directory}/spool",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, timeout=60, capture_output=True, text=True
    )


def _slowest(tree: str) -> list[str]:
    lines = re.findall(r"import time:\s*(\d+) \|\s*(\d+) \| (\s*)(\S+)", tree)
    modules = sorted(((int(total), int(own), name) for own, total, _, name in lines), reverse=True)
    return [f"{total / 1000:8.1f} ({own / 1000:.1f} its own)  {name}" for total, own, name in modules[:10]]
