"""Make what Lambda runs: the layer of third-party packages, and the asset of our own code.

    python layers/dependencies/build.py layer DIR       DIR/python/..., for a layer
    python layers/dependencies/build.py functions DIR   DIR/voxgate, DIR/api, DIR/sweep

Both carry bytecode of the runtime's own Python, without which a cold start takes five to seven times as long;
so a Python of that version must be at hand (`uv python install`, pyenv, the system's). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FUNCTIONS = HERE.parents[1] / "functions"
LOCK = HERE / "requirements.lock"
# The containers' `ingress` and `inference` are not Lambda's.
PARTS = ("voxgate", "api", "sweep")
# Lambda unpacks 250 MB of layers and code at most; the rest is for AWS's own layers.
LARGEST_LAYER, LARGEST_FUNCTIONS = 195_000_000, 5_000_000

# Not read when a package is imported: its tests, its types, what it was compiled from, and pip's notes.
_DIRECTORIES = {"tests", "test", "__pycache__", "bin"}
_SUFFIXES = {".pyi", ".pyx", ".pxd", ".c", ".cpp", ".h"}
_NOTES = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "py.typed"}


class BuildError(Exception):
    """The message is for whoever deploys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`python` is a version, as `3.13`. `platforms` are pip's names; none stands for this machine."""

    python: str
    platforms: tuple[str, ...] = ()


def lambda_target(python: str | None = None, architecture: str | None = None) -> Target:
    """Lambda's, unless told otherwise."""
    platform = tomllib.loads((HERE / "platform.toml").read_text(encoding="utf-8"))
    machine = architecture or platform["architecture"]
    names = tuple(f"{manylinux}_{machine}" for manylinux in platform["manylinux"])
    return Target(python=python or platform["python"], platforms=names)


def build_layer(directory: Path, target: Target, *, bytecode: bool = True) -> int:
    """Returns the size in bytes. Raises `BuildError`."""
    interpreter = _interpreter(target) if bytecode else None
    packages = directory / "python"
    shutil.rmtree(packages, ignore_errors=True)
    _install(packages, target)
    _strip(packages)
    if interpreter is not None:
        _compile(packages, "/opt/python", interpreter)
    return _checked(packages, LARGEST_LAYER)


def build_functions(directory: Path, target: Target, *, bytecode: bool = True) -> int:
    """Returns the size in bytes. Raises `BuildError`."""
    interpreter = _interpreter(target) if bytecode else None
    for part in PARTS:
        shutil.rmtree(directory / part, ignore_errors=True)
        shutil.copytree(FUNCTIONS / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
    if interpreter is not None:
        _compile(directory, "/var/task", interpreter)
    return _checked(directory, LARGEST_FUNCTIONS)


def interpreter_for(version: str) -> str | None:
    """A Python of that version on this machine: ours, one on the path, pyenv's, or uv's."""
    candidates = [sys.executable, shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += [str(found) for found in pyenv.glob(f"versions/{version}.*/bin/python")]
    if uv := shutil.which("uv"):
        found = _run([uv, "python", "find", "--system", "--no-python-downloads", version])
        candidates.append(found.stdout.strip() if found.returncode == 0 else None)
    for candidate in candidates:
        # A shim on the path may stand for nothing.
        ask = "import sys; print('%d.%d' % sys.version_info[:2])"
        if candidate and _run([candidate, "-I", "-c", ask]).stdout.strip() == version:
            return candidate
    return None


def _interpreter(target: Target) -> str:
    found = interpreter_for(target.python)
    if found is None:
        raise BuildError(
            f"There is no Python {target.python} here to compile for the runtime with: install one (for example "
            f"`uv python install {target.python}`), or give --without-bytecode and have slow cold starts."
        )
    return found


def _install(packages: Path, target: Target) -> None:
    """Wheels alone, each as the lock has it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--only-binary=:all:", "--require-hashes", "--no-deps", "--target", str(packages)]
    if target.platforms:
        command += ["--implementation", "cp", "--python-version", target.python]
        command += [argument for platform in target.platforms for argument in ("--platform", platform)]
    done = _run([*command, "--requirement", str(LOCK)])
    if done.returncode != 0:
        raise BuildError(f"The packages cannot be installed:\n{done.stderr.strip()}")


def _strip(packages: Path) -> None:
    for path in sorted(packages.rglob("*"), reverse=True):
        if path.is_dir() and path.name in _DIRECTORIES:
            shutil.rmtree(path)
        elif path.is_file() and (path.suffix in _SUFFIXES or path.name in _NOTES):
            path.unlink()


def _compile(directory: Path, deployed: str, interpreter: str) -> None:
    """Bytecode that is taken as it is, and names the files by where they will be."""
    command = [interpreter, "-I", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash"]
    # A set's order is in the bytecode, and two builds must not differ.
    done = _run([*command, "-s", str(directory), "-p", deployed, str(directory)], PYTHONHASHSEED="0")
    if done.returncode != 0:
        raise BuildError(f"What is in {directory} does not compile:\n{done.stdout}{done.stderr}")


def _checked(directory: Path, largest: int) -> int:
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if size > largest:
        raise BuildError(f"{directory} has {size} bytes; {largest} are allowed.")
    return size


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - the commands are this file's own
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Make what Lambda runs.")
    parser.add_argument("what", choices=["layer", "functions"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--python", metavar="VERSION", help="default: the runtime's, from platform.toml")
    parser.add_argument("--architecture", metavar="NAME", help="default: the runtime's, from platform.toml")
    parser.add_argument("--here", action="store_true", help="for this Python on this machine")
    parser.add_argument("--without-bytecode", action="store_true", help="leave it to every cold start")
    arguments = parser.parse_args()
    target = lambda_target(arguments.python, arguments.architecture)
    if arguments.here:
        target = Target(python=".".join(map(str, sys.version_info[:2])))
    build = build_layer if arguments.what == "layer" else build_functions
    try:
        size = build(arguments.directory, target, bytecode=not arguments.without_bytecode)
    except BuildError as error:
        sys.exit(f"build.py: {error}")
    if arguments.without_bytecode:
        print("build.py: without bytecode, cold starts take several times as long.", file=sys.stderr)
    report = {"directory": str(arguments.directory), "python": target.python, "platforms": target.platforms}
    print(json.dumps(report | {"bytes": size, "bytecode": not arguments.without_bytecode}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
