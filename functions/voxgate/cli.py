"""The `voxgate` command."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import socket
import sqlite3
import sys
from pathlib import Path

from voxgate import __version__, admin
from voxgate.errors import InvalidCatalog, InvalidSettings

Arguments = argparse.Namespace


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    try:
        sys.exit(arguments.command(arguments))
    except (InvalidCatalog, InvalidSettings) as error:
        sys.exit(f"voxgate: {error}")
    except sqlite3.Error as error:
        sys.exit(f"voxgate: the accounts cannot be used: {error}.")
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
    admin.add_data_dir(serve)
    serve.add_argument("--catalog", metavar="FILE", help="models and providers (default: the catalogue that ships)")
    serve.set_defaults(command=_serve)

    transcribe = commands.add_parser("transcribe", help="send audio files to a gateway and print what is said")
    transcribe.add_argument("files", nargs="+", type=Path, metavar="FILE")
    transcribe.add_argument("--format", default="text", choices=["text", "json", "verbose_json", "srt", "vtt"])
    transcribe.add_argument(
        "--output", type=Path, metavar="PATH", help="a file, or for several FILEs a directory (default: print)"
    )
    transcribe.add_argument("--language", help="the audio's language, such as en")
    transcribe.add_argument("--prompt", help="text that guides the style or spells names")
    _gateway(transcribe)
    transcribe.set_defaults(command=_transcribe)

    live = commands.add_parser("live", help="send speech while it is spoken, and print what is heard")
    live.add_argument("file", metavar="FILE", help="an audio file; - reads raw samples from the standard input")
    live.add_argument(
        "--encoding",
        choices=["pcm_s16le", "pcm_f32le", "mulaw", "alaw", "opus"],
        help="what FILE is, when it is to be sent as it is (default: it is decoded; for -: pcm_s16le)",
    )
    live.add_argument("--sample-rate", type=int, default=16_000, help="of raw samples (default: %(default)s)")
    live.add_argument("--channels", type=int, default=1, help="of raw samples (default: %(default)s)")
    live.add_argument(
        "--speed",
        type=_speed,
        default=1.0,
        help="times as fast as speech; 0: as fast as it goes (default: %(default)s)",
    )
    live.add_argument("--language", help="the speech's language, such as en")
    live.add_argument("--json", action="store_true", help="print every message")
    _gateway(live)
    live.set_defaults(command=_live)

    smoke = commands.add_parser("smoke", help="try a deployment from outside, as its customers do")
    _gateway(smoke)
    smoke.set_defaults(command=_smoke)

    inference = commands.add_parser("inference", help="run the recognizer alone, for other machines' gateways")
    _address(inference, 8100)
    inference.set_defaults(command=_inference)

    models = commands.add_parser("models", help="Whisper's weights").add_subparsers(metavar="ACTION", required=True)
    fetch = models.add_parser("fetch", help="get a model for VOXGATE_WHISPER_MODEL")
    fetch.add_argument(
        "model", help="a name such as large-v3-turbo or small, s3://bucket/prefix, or a hub's owner/name"
    )
    admin.add_data_dir(fetch)
    fetch.add_argument("--revision", default="", help="of a hub's model (default: the latest)")
    fetch.add_argument("--sha256", default="", help="that its weights must have")
    fetch.set_defaults(command=_fetch)

    invoke = commands.add_parser("invoke", help="run the Lambda handler on one API Gateway event, without AWS")
    invoke.add_argument("event", type=Path, metavar="EVENT.json")
    admin.add_data_dir(invoke)
    invoke.set_defaults(command=_invoke)

    admin.add_commands(commands)
    return parser


def _gateway(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-url",
        default=os.environ.get("VOXGATE_BASE_URL", "http://127.0.0.1:8000"),
        help="the gateway (default: VOXGATE_BASE_URL, else %(default)s)",
    )
    parser.add_argument("--api-key", default=os.environ.get("VOXGATE_API_KEY"), help="default: VOXGATE_API_KEY")
    parser.add_argument("--model", default="whisper-1")


def _api_key(arguments: Arguments) -> str:
    if not arguments.api_key:
        sys.exit("voxgate: set VOXGATE_API_KEY or give --api-key.")
    return str(arguments.api_key)


def _address(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=_port, default=port, help="default: %(default)s; 0 takes a free one")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def _serve(arguments: Arguments) -> int:
    from voxgate.hosts.asgi import AsgiApp
    from voxgate.hosts.gateway import build_application, build_sockets
    from voxgate.hosts.serve import run, url
    from voxgate.wiring import build_gateway, build_store, model_names

    settings = admin.settings_of(arguments)
    store = build_store(settings)
    # A deployment's table gets no account of ours.
    key, created = ("", False) if settings.table else asyncio.run(admin.local_key(settings, store))
    listening = _listen(arguments)
    gateway = build_gateway(settings, store)

    async def start() -> None:
        await gateway.start()
        print(f"Voxgate {__version__} listens at {url(listening)}")
        if gateway.pool is not None:
            engines = ", ".join(model_names(settings))
            print(f"Models {', '.join(gateway.catalog.models)} are served by the engine {engines} here.")
        shown = key if created else "in the same file as before"
        if settings.table:
            print(f"Accounts are those of the table {settings.table}.", flush=True)
        else:
            print(f"API key of the account 'local' ({settings.data_dir / 'api-key'}): {shown}", flush=True)

    app = AsgiApp(
        build_application(gateway),
        sockets=build_sockets(gateway),
        start=start,
        stop=gateway.close,
        slowest_upload=settings.slowest_upload,
    )
    run(app, listening, drain_seconds=settings.drain_seconds)
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
    from voxgate.wiring import build_pool, make_spool, model_names

    settings = admin.settings_of(arguments)
    listening = _listen(arguments)
    app = build_inference(
        pool=build_pool(settings),
        models=model_names(settings),
        settings=settings,
        spool_dir=make_spool(settings.spool_dir),
    )
    print(f"Inference with {', '.join(model_names(settings))} listens at {url(listening)}", flush=True)
    run(app, listening, drain_seconds=settings.drain_seconds)
    return 0


def _transcribe(arguments: Arguments) -> int:
    from voxgate.client import EXTENSIONS, ClientError, transcribe

    key = _api_key(arguments)
    fields = {
        "model": arguments.model,
        "response_format": arguments.format,
        "language": arguments.language or None,
        "prompt": arguments.prompt or None,
    }
    failed = False
    directory = arguments.output if arguments.output and len(arguments.files) > 1 else None
    for path in arguments.files:
        try:
            text = transcribe(path, arguments.base_url, key, fields)
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
    return int(failed)


def _speed(text: str) -> float:
    speed = float(text)
    if not 0 <= speed < math.inf:
        raise argparse.ArgumentTypeError("it is a number of at least 0")
    return speed


def _live(arguments: Arguments) -> int:
    from voxgate.client import ClientError
    from voxgate.live_client import Options, live

    raw = arguments.file == "-"
    options = Options(
        base_url=arguments.base_url,
        api_key=_api_key(arguments),
        model=arguments.model,
        language=arguments.language,
        encoding=arguments.encoding or ("pcm_s16le" if raw else None),
        sample_rate=arguments.sample_rate,
        channels=arguments.channels,
        speed=arguments.speed,
        as_json=arguments.json,
    )
    try:
        live(None if raw else Path(arguments.file), options)
    except ClientError as error:
        print(f"voxgate: {error}", file=sys.stderr)
        return 1
    return 0


def _fetch(arguments: Arguments) -> int:
    from voxgate import weights

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    into = admin.settings_of(arguments).data_dir / "models"
    try:
        found = weights.fetch(arguments.model, into, revision=arguments.revision, sha256=arguments.sha256)
    except weights.NoWeights as error:
        sys.exit(f"voxgate: {error}")
    print(f"VOXGATE_WHISPER_MODEL={found}")
    return 0


def _smoke(arguments: Arguments) -> int:
    from voxgate.smoke import smoke

    failed = False
    for step in smoke(arguments.base_url, _api_key(arguments), model=arguments.model):
        print(f"{'FAILED' if step.problem else 'ok':<6}  {step.milliseconds:6.0f} ms  {step.name}", flush=True)
        if step.problem:
            print(f"        {step.problem}", file=sys.stderr)
            failed = True
    return int(failed)


def _invoke(arguments: Arguments) -> int:
    from voxgate.hosts.lambda_rest import for_one_at_a_time, invoke
    from voxgate.wiring import build_gateway, build_store

    try:
        text = arguments.event.read_text(encoding="utf-8")
    except OSError as error:
        sys.exit(f"voxgate: {arguments.event}: {error.strerror}.")
    settings = for_one_at_a_time(admin.settings_of(arguments))
    store = build_store(settings)
    if "${VOXGATE_API_KEY}" in text:
        key = os.environ.get("VOXGATE_API_KEY", "")
        if not key and settings.table:
            sys.exit("voxgate: set VOXGATE_API_KEY to a key of the table's.")
        key = key or asyncio.run(admin.local_key(settings, store))[0]
        text = text.replace("${VOXGATE_API_KEY}", key)
    try:
        event = json.loads(text)
    except ValueError as error:
        sys.exit(f"voxgate: {arguments.event}: is not JSON: {error}.")
    with contextlib.redirect_stdout(sys.stderr):  # where the function's log and metrics go
        response = invoke(build_gateway(settings, store), event)
    print(json.dumps(response, indent=2, ensure_ascii=False))
    return 0
