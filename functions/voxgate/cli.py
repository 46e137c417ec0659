"""The `voxgate` command."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from voxgate import __version__
from voxgate.accounts import Account, Accounts, Key, keys
from voxgate.errors import InvalidCatalog, InvalidSettings
from voxgate.settings import Settings

Arguments = argparse.Namespace


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    try:
        sys.exit(arguments.command(arguments))
    except (InvalidCatalog, InvalidSettings) as error:
        sys.exit(f"voxgate: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"voxgate: {error.filename or 'the system'}: {error.strerror or error}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="voxgate", description="A speech-to-text gateway for five public contracts.")
    parser.add_argument("--version", action="version", version=f"voxgate {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="run the gateway and its recognizer on this machine")
    _address(serve, 8000)
    _data_dir(serve)
    serve.add_argument("--catalog", metavar="FILE", help="models and providers (default: the catalogue that ships)")
    serve.set_defaults(command=_serve)

    transcribe = commands.add_parser("transcribe", help="send audio files to a gateway and print what is said")
    transcribe.add_argument("files", nargs="+", type=Path, metavar="FILE")
    transcribe.add_argument("--format", default="text", choices=["text", "json", "verbose_json", "srt", "vtt"])
    transcribe.add_argument(
        "--output", type=Path, metavar="PATH", help="a file, or for several FILEs a directory (default: print)"
    )
    transcribe.add_argument("--model", default="whisper-1")
    transcribe.add_argument("--language", help="the audio's language, such as en")
    transcribe.add_argument("--prompt", help="text that guides the style or spells names")
    transcribe.add_argument(
        "--base-url",
        default=os.environ.get("VOXGATE_BASE_URL", "http://127.0.0.1:8000"),
        help="the gateway (default: VOXGATE_BASE_URL, else %(default)s)",
    )
    transcribe.add_argument("--api-key", default=os.environ.get("VOXGATE_API_KEY"), help="default: VOXGATE_API_KEY")
    transcribe.set_defaults(command=_transcribe)

    inference = commands.add_parser("inference", help="run the recognizer alone, for other machines' gateways")
    _address(inference, 8100)
    inference.set_defaults(command=_inference)

    invoke = commands.add_parser("invoke", help="run the Lambda handler on one API Gateway event, without AWS")
    invoke.add_argument("event", type=Path, metavar="EVENT.json")
    _data_dir(invoke)
    invoke.set_defaults(command=_invoke)

    _account_commands(commands)
    return parser


def _account_commands(commands: Any) -> None:
    accounts = commands.add_parser("accounts", help="open and show accounts").add_subparsers(
        metavar="ACTION", required=True
    )
    create = accounts.add_parser("create", help="open an account")
    create.add_argument("name", metavar="NAME")
    create.set_defaults(command=_stored(_create_account))
    show = accounts.add_parser("show", help="show an account and its keys")
    show.add_argument("account", metavar="ACCOUNT", help="an account's id or name")
    show.set_defaults(command=_stored(_show_account))
    key_actions = commands.add_parser("keys", help="create and revoke API keys").add_subparsers(
        metavar="ACTION", required=True
    )
    create_key = key_actions.add_parser("create", help="create a key and print it, this once")
    create_key.add_argument("account", metavar="ACCOUNT", help="an account's id or name")
    create_key.set_defaults(command=_stored(_create_key))
    revoke = key_actions.add_parser("revoke", help="make a key invalid for good")
    revoke.add_argument("key", metavar="KEY-ID")
    revoke.set_defaults(command=_stored(_revoke_key))
    for action in (create, show, create_key, revoke):
        _data_dir(action)
        action.add_argument("--json", action="store_true", help="print JSON")


def _address(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=_port, default=port, help="default: %(default)s; 0 takes a free one")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def _data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where accounts are kept (default: ./data)")


def _settings(arguments: Arguments) -> Settings:
    settings = Settings.from_environment()
    given = {name: getattr(arguments, name, None) for name in ("data_dir", "catalog")}
    return dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})


def _serve(arguments: Arguments) -> int:
    from voxgate.hosts.asgi import AsgiApp
    from voxgate.hosts.gateway import build_application
    from voxgate.hosts.serve import run, url
    from voxgate.wiring import build_gateway, model_name

    settings = _settings(arguments)
    accounts = _store(settings)
    key, created = asyncio.run(_local_key(settings, accounts))
    listening = _listen(arguments)
    gateway = build_gateway(settings, accounts)

    async def start() -> None:
        await gateway.start()
        print(f"Voxgate {__version__} listens at {url(listening)}")
        if gateway.pool is not None:
            print(f"Models {', '.join(gateway.catalog.models)} are served by the engine {model_name(settings)} here.")
        shown = key if created else "in the same file as before"
        print(f"API key of the account 'local' ({settings.data_dir / 'api-key'}): {shown}", flush=True)

    run(AsgiApp(build_application(gateway), start=start, stop=gateway.close), listening)
    return 0


def _listen(arguments: Arguments) -> socket.socket:
    from voxgate.hosts.serve import bind

    try:
        return bind(arguments.host, arguments.port)
    except OSError as error:
        sys.exit(f"voxgate: {arguments.host}:{arguments.port} cannot be used: {error.strerror}.")


def _inference(arguments: Arguments) -> int:
    from voxgate.hosts.inference import build_inference
    from voxgate.hosts.serve import run, url
    from voxgate.wiring import build_pool, make_spool, model_name

    settings = _settings(arguments)
    listening = _listen(arguments)
    app = build_inference(
        pool=build_pool(settings),
        model=model_name(settings),
        settings=settings,
        spool_dir=make_spool(settings.spool_dir),
    )
    print(f"Inference with {model_name(settings)} listens at {url(listening)}", flush=True)
    run(app, listening)
    return 0


def _transcribe(arguments: Arguments) -> int:
    from voxgate.client import EXTENSIONS, ClientError, Options, transcribe

    if not arguments.api_key:
        sys.exit("voxgate: set VOXGATE_API_KEY or give --api-key.")
    options = Options(
        base_url=arguments.base_url,
        api_key=arguments.api_key,
        model=arguments.model,
        format=arguments.format,
        language=arguments.language,
        prompt=arguments.prompt,
    )
    failed = False
    directory = arguments.output if arguments.output and len(arguments.files) > 1 else None
    for path in arguments.files:
        try:
            text = transcribe(path, options)
        except ClientError as error:
            print(f"voxgate: {error}", file=sys.stderr)
            failed = True
            continue
        target = arguments.output
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            target = directory / f"{path.name}.{EXTENSIONS[arguments.format]}"
        if target is None:
            print(text if text.endswith("\n") else f"{text}\n", end="", flush=True)
        else:
            target.write_text(text, encoding="utf-8")
    return 1 if failed else 0


def _invoke(arguments: Arguments) -> int:
    from voxgate.hosts.lambda_rest import for_one_at_a_time, invoke
    from voxgate.wiring import build_gateway

    try:
        text = arguments.event.read_text(encoding="utf-8")
    except OSError as error:
        sys.exit(f"voxgate: {arguments.event}: {error.strerror}.")
    settings = for_one_at_a_time(_settings(arguments))
    accounts = _store(settings)
    if "${VOXGATE_API_KEY}" in text:
        key = os.environ.get("VOXGATE_API_KEY") or asyncio.run(_local_key(settings, accounts))[0]
        text = text.replace("${VOXGATE_API_KEY}", key)
    try:
        event = json.loads(text)
    except ValueError as error:
        sys.exit(f"voxgate: {arguments.event}: is not JSON: {error}.")
    with contextlib.redirect_stdout(sys.stderr):  # where the function's log and metrics go
        response = invoke(build_gateway(settings, accounts), event)
    print(json.dumps(response, indent=2, ensure_ascii=False))
    return 0


def _store(settings: Settings) -> Accounts:
    from voxgate.accounts.sqlite import SqliteAccounts

    return SqliteAccounts(settings.data_dir / "voxgate.sqlite")


async def _local_key(settings: Settings, accounts: Accounts) -> tuple[str, bool]:
    """The key of the account `local`, and whether it was created now."""
    file = settings.data_dir / "api-key"
    key = file.read_text(encoding="ascii").strip() if file.exists() else ""
    if key and await accounts.find_key(keys.digest(key)) is not None:
        return key, False
    try:
        account = await accounts.find_account("local")
    except KeyError:
        account = await accounts.create_account("local")
    created = not keys.well_formed(key)  # the file may be older than the database
    key = keys.generate() if created else key
    await accounts.create_key(account.id, keys.digest(key))
    if created:
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, f"{key}\n".encode())
        os.close(descriptor)
    return key, created


def _stored(action: Callable[[Accounts, Arguments], Awaitable[None]]) -> Callable[[Arguments], int]:
    """A command that works on the store of accounts."""

    async def run(accounts: Accounts, arguments: Arguments) -> int:
        try:
            await action(accounts, arguments)
        except (KeyError, ValueError) as error:
            print(f"voxgate: {error.args[0]}", file=sys.stderr)
            return 1
        finally:
            await accounts.close()
        return 0

    return lambda arguments: asyncio.run(run(_store(_settings(arguments)), arguments))


async def _create_account(accounts: Accounts, arguments: Arguments) -> None:
    if not arguments.name.strip():
        raise ValueError("An account needs a name.")
    account = await accounts.create_account(arguments.name)
    _say(arguments, dataclasses.asdict(account), f"Opened the account '{account.name}' ({account.id}).")


async def _show_account(accounts: Accounts, arguments: Arguments) -> None:
    account = await accounts.find_account(arguments.account)
    owned = await accounts.keys(account.id)
    text = "\n".join([f"{account.name} ({account.id})", *(_key_line(key) for key in owned)])
    _say(arguments, _account(account, owned), text)


async def _create_key(accounts: Accounts, arguments: Arguments) -> None:
    account = await accounts.find_account(arguments.account)
    secret = keys.generate()
    key = await accounts.create_key(account.id, keys.digest(secret))
    text = f"{secret}\n({key.id}, for the account '{account.name}'; it is not stored and cannot be shown again)"
    _say(arguments, dataclasses.asdict(key) | {"key": secret}, text)


async def _revoke_key(accounts: Accounts, arguments: Arguments) -> None:
    key = await accounts.revoke_key(arguments.key)
    _say(arguments, dataclasses.asdict(key), f"Revoked {key.id}.")


def _account(account: Account, owned: list[Key]) -> dict[str, Any]:
    return dataclasses.asdict(account) | {"keys": [dataclasses.asdict(key) for key in owned]}


def _key_line(key: Key) -> str:
    return f"  {key.id}{'  revoked' if key.revoked else ''}"


def _say(arguments: Arguments, value: dict[str, Any], text: str) -> None:
    print(json.dumps(value) if arguments.json else text)
