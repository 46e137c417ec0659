from __future__ import annotations

import dataclasses
import os

import pytest

from conftest import untraced
from infra.environments import ENVIRONMENTS
from synthesized import Synthesized, Templates, synthesize, synthesize_pipeline


@pytest.fixture(scope="module", autouse=True)
def _untraced(untraced: None) -> None:
    """All of these: they run CDK, containers' commands and pip, and little of the library."""


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Synthesized]:
    """All of them: the first takes some seconds, for jsii's start, and the others one each. Where there are
    several workers, whose directories are beside each other, the first one makes them for all."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cdk"
    with untraced(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDK_DOCKER", "/nowhere/docker")  # nothing may ask for it
        return {
            # Whoever runs the tests may have an account.
            name: synthesize(dataclasses.replace(environment, account=None), directory / name)
            for name, environment in ENVIRONMENTS.items()
        }


@pytest.fixture(params=list(ENVIRONMENTS))
def each(request: pytest.FixtureRequest, environments: dict[str, Synthesized]) -> Synthesized:
    """The test once for each environment."""
    return environments[request.param]


@pytest.fixture
def prod(environments: dict[str, Synthesized]) -> Synthesized:
    return environments["prod"]


@pytest.fixture
def dev(environments: dict[str, Synthesized]) -> Synthesized:
    """Without ingress, inference and domain."""
    return environments["dev"]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    """What an account has once, for all environments."""
    return synthesize_pipeline(tmp_path_factory.mktemp("pipeline"))
