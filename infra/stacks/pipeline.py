"""What lets GitHub deploy: once for each account, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import aws_cdk as cdk
from constructs import Construct

from infra import environments as environments_
from infra.constructs.pipeline import Pipeline
from infra.environments import Environment


class PipelineStack(cdk.Stack):
    def __init__(
        self,
        scope: Construct,
        id: str,  # noqa: A002
        *,
        pipeline: environments_.Pipeline,
        environments: Sequence[Environment],
        env: cdk.Environment,
    ) -> None:
        super().__init__(scope, id, env=env, termination_protection=True)
        self.pipeline = Pipeline(self, "Pipeline", pipeline=pipeline, environments=environments)
