"""``cascade-serve``."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from .. import __version__
from ..commands import CommandParser, run_command
from ..errors import CascadeError, RequestError, shown
from ..files import MIB, name_of, read_bounded, said_by

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..bundle import Bundle
    from .metrics import Metrics
    from .pool import Pool

EXAMPLES = """examples:
  cascade-serve
  cascade-serve --bundle cascade-big --provider cuda --host 0.0.0.0 --api-key-file keys.txt
  cascade-serve --bundle tiny=bundles/tiny --bundle style=bundles/style --max-batch 8
  curl http://127.0.0.1:8000/v1/images/generations -H 'content-type: application/json' -d '{"prompt": "a red circle"}'
"""
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
MAX_KEYS_BYTES = MIB
KEEP_ALIVE_SECONDS = 75
"""That a connection stays open without a request: longer than clients keep theirs, so that none is closed on a request
that is on its way."""
MAX_WORKERS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


def parser() -> argparse.ArgumentParser:
    """The command line of ``cascade-serve``."""
    made = CommandParser("cascade-serve", "Serve pictures over HTTP: OpenAI's Images API, and a page.", EXAMPLES)
    add = made.add_argument
    add(
        "--bundle",
        action="append",
        metavar="[NAME=]DIR",
        help="engine bundle, and the name of its model; repeatable, the first is the default model "
        "(default: the bundle that is shipped)",
    )
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    add(
        "--api-key-file", type=Path, metavar="FILE", help="accepted API keys, one a line (default: everybody is served)"
    )
    add(
        "--max-batch",
        type=int,
        default=16,
        metavar="N",
        help="rows of one engine call; a picture takes one, with guidance two (default: 16)",
    )
    add(
        "--lora",
        action="append",
        metavar="[NAME=]FILE",
        help="LoRA file that requests may name in their field loras; repeatable",
    )
    add(
        "--lora-sets",
        type=int,
        default=2,
        metavar="N",
        help="sets of LoRA files whose engines are open at once, each as large as the model (default: 2)",
    )
    add("--queue", type=int, default=64, metavar="N", help="pictures that wait or are drawn, at most (default: 64)")
    add("--context-memory", type=float, default=4, metavar="GIB", help="for pictures drawn together (default: 4)")
    add(
        "--max-pixels",
        type=int,
        default=4 << 20,
        metavar="N",
        help="pixels of a picture, and of the pictures of one call (default: 4194304, which is 2048x2048)",
    )
    add("--timeout", type=float, default=600, metavar="S", help="seconds that a request may take (default: 600)")
    add("--grace", type=float, default=30, metavar="S", help="seconds to finish what runs, on SIGTERM (default: 30)")
    add("--provider", default="auto", metavar="NAME", help="who runs the engines (default: auto)")
    add(
        "--workers",
        default="1",
        metavar="N",
        help="copies of the engines: on CPUs each has its share of the cores, on GPUs each its own GPU; with --ray "
        "also LEAST-MOST, between which the load decides (default: 1)",
    )
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="draw in replicas of Ray Serve, on the cluster at this address (default: one of this machine)",
    )
    add(
        "--finish-abandoned",
        action="store_true",
        help="draw on for clients that left, but for streams; GET /v1/images/jobs/ID has the answer",
    )
    add("--log-prompts", action="store_true", help="write prompts into the log")
    add("--version", action="version", version=f"cascade-rt {__version__}")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cascade-serve``; returns the exit code."""
    return run_command(lambda: serve(parser().parse_args(argv)))


def serve(args: argparse.Namespace) -> None:
    """Serve until a signal says that it is enough.

    Raises:
        RequestError: a value of the command line that is not accepted.
        CascadeError: the port is taken, a package is missing, or the engines cannot make a picture.
    """
    check_installed()
    check_numbers(args)
    from .app import Settings, make_app
    from .metrics import Metrics

    keys = read_keys(args.api_key_file)
    bundles = open_bundles(args.bundle)
    metrics = Metrics()
    pool = make_pool(args, bundles, metrics)
    settings = Settings(
        keys=keys,
        timeout=args.timeout,
        loras=find_loras(args.lora),
        finish_abandoned=args.finish_abandoned,
        log_prompts=args.log_prompts,
    )
    app = make_app(pool, settings, metrics)
    with listen(args.host, args.port) as listener:
        if not is_loopback(args.host):
            print(f"warning: {args.host} can be reached from other machines{who_draws(keys)}", file=sys.stderr)
        port = listener.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"cascade-serve: http://{host}:{port} (models: {', '.join(bundles)})", file=sys.stderr, flush=True)
        log_as_json()
        run(app, listener, args.grace)


def run(app: FastAPI, listener: socket.socket, grace: float) -> None:
    """Serve on a socket until SIGINT or SIGTERM; then finish what runs, for at most ``grace`` seconds.

    Raises:
        CascadeError: the engines cannot make a picture.
    """
    import uvicorn

    from .connections import timed_protocol

    state = app.state.cascade

    class Server(uvicorn.Server):
        def handle_exit(self, _signal: int, _frame: FrameType | None) -> None:
            state.stopping = True
            self.force_exit = self.should_exit  # the second signal does not wait
            self.should_exit = True

    config = uvicorn.Config(
        app,
        http=timed_protocol(state.settings.header_seconds),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace)),
        backlog=2048,
    )
    server = Server(config)

    def stop() -> None:
        server.should_exit = True

    state.on_failure = stop
    server.run(sockets=[listener])
    if state.failed is not None:
        raise state.failed


def make_pool(args: argparse.Namespace, bundles: dict[str, Bundle], metrics: Metrics) -> Pool:
    """What draws: engines of this process, or replicas of Ray Serve."""
    from .limits import Limits

    limits = Limits(
        rows=args.max_batch,
        pictures=args.queue,
        context_bytes=round(args.context_memory * 2**30),
        pixels=args.max_pixels,
        variants=args.lora_sets,
    )
    least, most = parse_workers(args.workers)
    if args.ray is not None:
        from .ray_pool import RayPool

        return RayPool(bundles, args.provider, limits, (least, most), args.ray, metrics)
    from .local import local_pool

    if least != most:
        raise RequestError(f"--workers {shown(args.workers)}: only --ray changes their number; give one number")
    return local_pool(bundles, args.provider, limits, most, metrics)


def parse_workers(text: str) -> tuple[int, int]:
    """``N`` or ``LEAST-MOST``.

    Raises:
        RequestError: it is neither, or out of 1..256.
    """
    match = re.fullmatch(r"([0-9]{1,3})(?:-([0-9]{1,3}))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most <= MAX_WORKERS:
        raise RequestError(f"--workers {shown(text)} is not accepted; it must be N or LEAST-MOST, 1 to {MAX_WORKERS}")
    return least, most


def open_bundles(places: Sequence[str] | None) -> dict[str, Bundle]:
    """Bundles by the names of their models.

    Raises:
        RequestError: two of one name, or a name that cannot be in an address.
        BundleError: one cannot be read.
    """
    from ..bundle import find_bundle

    found: dict[str, Bundle] = {}
    for place in places or [""]:
        name, _, folder = place.rpartition("=") if not os.path.lexists(place) else ("", "", place)
        bundle = find_bundle(folder or None)
        name = name or bundle.name
        if not _NAME.fullmatch(name):
            raise RequestError(f"--bundle: {shown(name)} cannot be the name of a model; use letters, digits and ._/-")
        if name in found:
            raise RequestError(f"--bundle: there are two models {name}; name them: --bundle NAME=DIR")
        found[name] = bundle
    return found


def find_loras(places: Sequence[str] | None) -> dict[str, str]:
    """Paths of LoRA files by the names under which requests ask for them.

    Raises:
        RequestError: two of one name, or a name that is none.
        CheckpointError: a file is missing, damaged, or no LoRA file.
    """
    from ..lora import Lora, lora_path

    found: dict[str, str] = {}
    for place in places or ():
        name, _, file = place.rpartition("=") if not os.path.lexists(place) else ("", "", place)
        path = lora_path(file).resolve()
        name = name or path.stem
        if not _NAME.fullmatch(name):
            raise RequestError(f"--lora: {shown(name)} cannot be the name of a LoRA; use letters, digits and ._/-")
        if name in found:
            raise RequestError(f"--lora: there are two LoRA files {name}; name them: --lora NAME=FILE")
        Lora(path)  # it can be read
        found[name] = str(path)
    return found


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The accepted API keys; lines that are empty or begin with # are left out.

    Raises:
        RequestError: the file cannot be read, or holds no key.
    """
    if path is None:
        return ()
    try:
        text = read_bounded(path, MAX_KEYS_BYTES, RequestError).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"--api-key-file: there is no file {name_of(path)}") from None
    except UnicodeDecodeError:
        raise RequestError(f"--api-key-file: {name_of(path)} is no text in UTF-8") from None
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise RequestError(f"--api-key-file: {name_of(path)} holds no key; write one a line")
    return keys


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant.

    Raises:
        RequestError: with the flag.
    """
    for flag, value, least, most in (
        ("--port", args.port, 0, 65535),
        ("--max-batch", args.max_batch, 1, 1024),
        ("--max-pixels", args.max_pixels, 64 * 64, 4096 * 4096),
        ("--queue", args.queue, 1, 1_000_000),
        ("--lora-sets", args.lora_sets, 1, 64),
        ("--timeout", args.timeout, 0.1, 86_400),
        ("--grace", args.grace, 0, 86_400),
        ("--context-memory", args.context_memory, 0.001, 100_000),
    ):
        if not least <= value <= most:
            raise RequestError(f"{flag} {shown(value)} is not accepted; it must be from {least} to {most}")


def check_installed() -> None:
    """Refuse to begin without what the service is made of.

    Raises:
        CascadeError: a package is missing, with the command that installs it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CascadeError(f"cascade-serve needs {', '.join(missing)}; install: pip install 'cascade-rt[serve]'")


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        CascadeError: the address is not of this machine, or the port is taken or not allowed.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CascadeError(
            f"{shown(host)} port {port} cannot be listened on: {said_by(error)}; use another --port or --host"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def who_draws(keys: Sequence[str]) -> str:
    """What an address that is not loopback means, for the warning."""
    if not keys:
        return ", and there are no API keys: everybody there can draw. Use --host 127.0.0.1, or --api-key-file"
    return (
        "; who has an API key can draw. Keys and pictures are sent as they are: put a proxy with TLS in front, or use "
        "--host 127.0.0.1"
    )


def log_as_json() -> None:
    """Send the service's log, and uvicorn's, to standard error as lines of JSON."""
    from .app import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("cascade_rt.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("cascade_rt.serve").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
