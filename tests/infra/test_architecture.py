"""The diagrams of docs/architecture.md are of what is deployed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synthesized import Synthesized, Templates

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PICTURE, REQUEST = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
OUTSIDE = {"client", "providers", "operator", "github"}
# What both functions are made of: its box is theirs.
NO_BOX = {"Function"}


def classes(directory: str, base: str) -> dict[str, Path]:
    """Those that derive from it, by their names, with their files."""
    return {
        found.name: file
        for file in (ROOT / "infra" / directory).glob("*.py")
        for found in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(found, ast.ClassDef) and any(ast.unparse(one).split(".")[-1] == base for one in found.bases)
    }


BOXES = classes("constructs", "Construct")
STACKS = classes("stacks", "Stack")


def in_the_picture() -> set[str]:
    """Every node and subgraph, where it is made and where an arrow begins or ends."""
    bare = re.sub(r'"[^"]*"', "", PICTURE)
    return set(re.findall(r"\w+", bare)) - {"flowchart", "TB", "subgraph", "end"}


def in_the_request() -> set[str]:
    assert ";" not in REQUEST, "Mermaid ends a message there."
    found: set[str] = set()
    for line in map(str.strip, REQUEST.splitlines()):
        if noted := re.match(r"Note over ([\w,]+): ", line):
            found |= set(noted[1].split(","))
        elif called := re.match(r"(\w+)--?>>(\w+): ", line):
            found |= {called[1], called[2]}
        else:
            assert re.match(r"(sequenceDiagram|actor|participant|alt|else|end|$)", line), line
    return found


def paths(tree: dict[str, Any]) -> Iterator[str]:
    yield "/" + tree["path"]
    for child in tree.get("children", {}).values():
        yield from paths(child)


@pytest.fixture
def deployed(prod: Synthesized, pipeline: Templates) -> set[str]:
    """The path of every construct that there is."""
    files = [one.directory / "tree.json" for one in (prod, pipeline)]
    return {path for file in files for path in paths(json.loads(file.read_text(encoding="utf-8"))["tree"])}


def test_every_construct_is_a_box_of_the_picture() -> None:
    assert BOXES.keys() >= {"Api", "Data", "Edge", "Inference", "Ingress"}
    assert BOXES.keys() - in_the_picture() == NO_BOX
    assert STACKS.keys() <= in_the_picture()


def test_every_name_in_the_picture_is_deployed(deployed: set[str]) -> None:
    for name in in_the_picture() - OUTSIDE - STACKS.keys():
        assert name.partition("_")[0] in BOXES, name
        assert any(path.endswith("/" + name.replace("_", "/")) for path in deployed), name


def test_every_arrow_is_between_what_was_drawn() -> None:
    made = set(re.findall(r"^ *(?:subgraph )?(\w+)[\[(]", PICTURE, re.MULTILINE))
    assert in_the_picture() == made
    assert made >= OUTSIDE


def test_a_request_goes_through_boxes_of_the_picture() -> None:
    listed = set(re.findall(r"^ *(?:actor|participant) (\w+)$", REQUEST, re.MULTILINE))
    assert in_the_request() == listed
    assert listed <= BOXES.keys() | OUTSIDE
    for mentioned in ("Firewall", "Route", "OriginGuard"):
        assert mentioned in REQUEST
        assert mentioned in PICTURE


def test_the_table_says_which_file_holds_which_box() -> None:
    rows = re.findall(r"^\| (`[A-Z].*?) \| `(.*?)` \| (.*?) ?\|$", PAGE, re.MULTILINE)
    said = {box: ROOT / file for boxes, file, _ in rows for box in re.findall(r"`(\w+)`", boxes)}
    assert said == {box: file for box, file in BOXES.items() if box not in NO_BOX}
    for file in re.findall(r"`([\w./-]+/[\w.-]+)`", PAGE):
        assert (ROOT / file).exists(), file


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
