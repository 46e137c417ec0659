"""Prometheus's text format, read as strictly as its own scraper does.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import re

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*"'
_SAMPLE = re.compile(rf"({_NAME})(\{{{_LABEL}(?:,{_LABEL})*\}})? (\S+)")
_HELP = re.compile(rf"# HELP ({_NAME}) .+")
_TYPE = re.compile(rf"# TYPE ({_NAME}) (counter|gauge|histogram|summary|untyped)")


def scraped(text: str) -> dict[str, float]:
    """Each sample by its name and its labels, as they are written. Each is below the type of its family, which is
    said once, and the buckets of a histogram never fall."""
    assert text.endswith("\n")
    samples: dict[str, float] = {}
    types: dict[str, str] = {}
    family = ""
    for line in text.splitlines():
        if said := _HELP.fullmatch(line):
            assert said[1] not in types, line
        elif said := _TYPE.fullmatch(line):
            family = said[1]
            assert family not in types, line
            types[family] = said[2]
        else:
            said = _SAMPLE.fullmatch(line)
            assert said, line
            suffix = said[1].removeprefix(family)
            assert said[1].startswith(family), line
            assert suffix in (("_bucket", "_sum", "_count") if types[family] == "histogram" else ("",)), line
            assert said[1] + (said[2] or "") not in samples, line
            samples[said[1] + (said[2] or "")] = float(said[3])
    for family in (name for name, kind in types.items() if kind == "histogram"):
        buckets = [(name, value) for name, value in samples.items() if name.startswith(f"{family}_bucket")]
        bounds = [float(name.split('le="')[1].removesuffix('"}')) for name, _ in buckets]
        assert bounds == sorted(set(bounds)), family
        assert bounds[-1] == float("inf")
        assert [value for _, value in buckets] == sorted(value for _, value in buckets)
        assert buckets[-1][1] == samples[f"{family}_count"]
    return samples
