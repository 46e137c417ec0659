"""A function that goes on from a snapshot of itself: everything loaded, and nothing shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

# What Lambda's runtime does: it initializes, takes the snapshot, and calls the hooks in each copy. A copy is a fork.
DRIVER = """
import json, os, random, sys, types
hooks = []
sys.modules["snapshot_restore_py"] = types.SimpleNamespace(register_after_restore=hooks.append)
import api.handler
before, loaded = set(sys.modules), api.handler._answer
event = json.load(open(sys.argv[1]))
event["headers"]["Authorization"] = "Bearer " + os.environ["KEY"]
event["multiValueHeaders"] = {}
context = types.SimpleNamespace(function_name="f", memory_limit_in_mb=1, invoked_function_arn="a", aws_request_id="r")
for _ in range(2):
    read, write = os.pipe()
    if os.fork() == 0:
        for hook in hooks:
            hook()
        assert api.handler._answer is not loaded
        answer = api.handler.handler(event, context)
        own = sorted(n for n in set(sys.modules) - before if n.startswith(("voxgate", "httpx", "av")))
        told = {"status": answer["statusCode"], "id": answer["multiValueHeaders"]["x-request-id"], "loaded": own,
                "random": random.random(), "body": answer["body"]}
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    print(open(read).read())
    os.wait()
"""


def test_each_copy_of_a_snapshot_serves_with_parts_of_its_own(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")} | {
        "AWS_LAMBDA_INITIALIZATION_TYPE": "snap-start",
        "PYTHONPATH": str(ROOT / "functions"),
        "VOXGATE_DATA_DIR": str(tmp_path),
        "VOXGATE_SPOOL_DIR": str(tmp_path / "spool"),
        "POWERTOOLS_LOG_LEVEL": "CRITICAL",
        "POWERTOOLS_METRICS_DISABLED": "true",
    }
    made = subprocess.run(
        [sys.executable, "-m", "voxgate", "accounts", "create", "acme", "--credit", "1.00"],
        env=environment,
        check=True,
        capture_output=True,
    )
    assert made.returncode == 0
    key = subprocess.run(
        [sys.executable, "-m", "voxgate", "keys", "create", "acme", "--json"],
        env=environment,
        check=True,
        capture_output=True,
    )
    environment["KEY"] = json.loads(key.stdout)["key"]
    event = ROOT / "events" / "openai.json"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(event)], env=environment, check=True, capture_output=True, text=True
    )
    one, other = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"status"'))
    assert (one["status"], other["status"]) == (200, 200), (one, other)
    assert one["id"] != other["id"]
    assert one["random"] != other["random"]
    assert [name for name in one["loaded"] if not name.startswith("voxgate.engines")] == []
