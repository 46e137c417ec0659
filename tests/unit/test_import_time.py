"""A ceiling on what a cold start of the Lambda function loads, as a ratio, so that no machine's speed counts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

FUNCTIONS = Path(__file__).parents[2] / "functions"
HANDLER = "import api.handler"
# What a function with the usual parts loads at its start.
USUAL = """
import boto3
from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.event_handler import APIGatewayRestResolver
from pydantic import BaseModel
import httpx
boto3.client("s3"); boto3.client("dynamodb")
Logger(service="x"); Metrics(namespace="x", service="x"); APIGatewayRestResolver(); httpx.Client()
class Form(BaseModel):
    model: str
"""


def seconds(code: str, directory: Path) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VOXGATE_", "COV"))} | {
        "PYTHONPATH": str(FUNCTIONS),
        "VOXGATE_DATA_DIR": str(directory),
        "VOXGATE_SPOOL_DIR": str(directory / "spool"),
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    return time.perf_counter() - begun


def test_the_function_starts_in_at_most_four_fifths_of_the_usual_time(tmp_path: Path) -> None:
    seconds(HANDLER, tmp_path), seconds(USUAL, tmp_path)  # the first run compiles
    pairs = [(seconds(HANDLER, tmp_path), seconds(USUAL, tmp_path)) for _ in range(4)]
    ours, usual = (min(times) for times in zip(*pairs, strict=True))
    assert ours <= 0.8 * usual, f"{ours:.2f} s against {usual:.2f} s"
