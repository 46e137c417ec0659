"""The CDK app of one environment: `python infra/app.py dev`, `make synth ENV=dev`, or, in this directory,
`npx aws-cdk@2 synth -c env=dev`. In the place of an environment, `pipeline` is what an account has but once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Python puts this file's own directory first, in which `constructs` is ours and would hide the package.
_HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

import infra  # noqa: E402, F401, I001 - names Node before aws_cdk asks for it
import aws_cdk as cdk  # noqa: E402
from cdk_nag import AwsSolutionsChecks  # noqa: E402

from infra import environments  # noqa: E402
from infra.environments import Environment, Pipeline  # noqa: E402
from infra.stacks.data import DataStack  # noqa: E402
from infra.stacks.front import FrontStack  # noqa: E402
from infra.stacks.pipeline import PipelineStack  # noqa: E402
from infra.stacks.service import ServiceStack  # noqa: E402


def build(environment: Environment, *, outdir: Path | None = None, bundle: bool = True) -> cdk.App:
    """The app, not synthesized yet. Without `bundle` the dependency layer is left empty."""
    app = _app(outdir, {} if bundle else {"aws:cdk:bundling-stacks": []})
    add_stacks(app, environment)
    return app


def build_pipeline(
    pipeline: Pipeline, *, account: str | None, deployed: Sequence[Environment], outdir: Path | None = None
) -> cdk.App:
    """`deployed` are the environments of the account."""
    app = _app(outdir, {})
    PipelineStack(
        app,
        "Voxgate-Pipeline",
        pipeline=pipeline,
        environments=deployed,
        env=cdk.Environment(account=account, region=pipeline.region),
    )
    cdk.Tags.of(app).add("service", "voxgate")
    judge(app)
    return app


def _app(outdir: Path | None, context: Mapping[str, object]) -> cdk.App:
    # The CLI reads the flags out of the file too; Python alone would not.
    flags = json.loads((_HERE / "cdk.json").read_text(encoding="utf-8"))["context"]
    return cdk.App(context={**flags, **context}, outdir=None if outdir is None else str(outdir))


def add_stacks(app: cdk.App, environment: Environment) -> None:
    prefix = f"Voxgate-{environment.name}"
    here = cdk.Environment(account=environment.account, region=environment.region)
    north_virginia = cdk.Environment(account=environment.account, region="us-east-1")
    data = DataStack(app, f"{prefix}-Data", environment=environment, env=here)
    front = FrontStack(app, f"{prefix}-Front", environment=environment, env=north_virginia)
    ServiceStack(app, f"{prefix}-Service", environment=environment, env=here, data=data.data, front=front)
    cdk.Tags.of(app).add("service", "voxgate")
    cdk.Tags.of(app).add("environment", environment.name)
    judge(app)


def judge(app: cdk.App) -> None:
    """A finding stops the synthesis, unless it is acknowledged where it is, with its reason."""
    cdk.Validations.of(app).add_plugins(AwsSolutionsChecks(app))


def main(arguments: list[str]) -> None:
    # The CLI says where it wants the assembly, and passes `-c env=NAME`; both in variables of its own.
    asked = json.loads(os.environ.get("CDK_CONTEXT_JSON", "{}")).get("env")
    name = arguments[0] if arguments else asked or "dev"
    outdir = None if "CDK_OUTDIR" in os.environ else _HERE / "cdk.out" / name
    if name == "pipeline":
        account = os.environ.get("CDK_DEFAULT_ACCOUNT")
        deployed = environments.deployed_to(account)
        build_pipeline(environments.PIPELINE, account=account, deployed=deployed, outdir=outdir).synth()
    else:
        build(environments.named(name), outdir=outdir).synth()


if __name__ == "__main__":
    main(sys.argv[1:])
