"""Run the benches that are named, or all, and print what they found."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import (
    busy,
    durations,
    fallback,
    gateways,
    gateways_docs,
    imports,
    inference,
    live,
    memory,
    metering,
    multipart,
    recognition,
    slow_uploads,
    streaming,
)
from .report import Report, machine

BENCHES: dict[str, Callable[[], Report]] = {
    "multipart": multipart.run,
    "durations": durations.run,
    "memory": memory.run,
    "imports": imports.run,
    "busy": busy.run,
    "metering": metering.run,
    "recognition": recognition.run,
    "fallback": fallback.run,
    "live": live.run,
    "inference": inference.run,
    "gateways": gateways.run,
    "streaming": streaming.run,
    "slow-uploads": slow_uploads.run,
}


def main() -> None:
    names = "".join(f"\n  {name:<12} {_first_line(bench)}" for name, bench in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=f"{__doc__}\n\nbenches:{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to run; without one, everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result to FILE, as one JSON array")
    parser.add_argument("--docs", action="store_true", help="write what `gateways` found into docs/")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHES):
        parser.error(f"there is no bench named {', '.join(sorted(unknown))}")
    if arguments.docs and "gateways" not in (arguments.names or BENCHES):
        parser.error("--docs is for `gateways`")
    results = []
    for name in arguments.names or BENCHES:
        begun = time.perf_counter()
        report = BENCHES[name]()
        result = {
            "bench": name,
            "machine": machine(),
            "seconds": round(time.perf_counter() - begun, 1),
            **report.summary(),
        }
        print(report.text(), json.dumps(result), sep="\n", end="\n\n", flush=True)
        if arguments.docs and name == "gateways":
            gateways_docs.write(report)
        results.append(result | {"rows": report.records()})
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _first_line(bench: Callable[[], Report]) -> str:
    return (sys.modules[bench.__module__].__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    main()
