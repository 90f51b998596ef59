"""`moshivis serve`: load a model, open a server, say where it is."""

from __future__ import annotations

import argparse
import atexit
import os
import threading
import webbrowser

from rich.console import Console
from rich.markup import escape

from moshivis.extras import need

NEEDED = ("starlette", "uvicorn", "websockets", "sphn", "prometheus_client", "cryptography")
EMULATED = (
    "this device has no instructions for bfloat16: several conversations take far longer than as many one by one; "
    "add --sessions 1, or --dtype float32, which takes twice the memory"
)


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until told to stop. Raises MoshivisError for anything that the user can mend, mostly before loading."""
    need(NEEDED, extra="serve", what="the server")
    from moshivis.checkpoints.load import dtype_named
    from moshivis.inference.conversation import load
    from moshivis.inference.engine import Engine
    from moshivis.serve.address import bind, is_local, url
    from moshivis.serve.hall import Hall
    from moshivis.serve.limits import Limits
    from moshivis.serve.metrics import Metrics
    from moshivis.serve.run import leave, run_server, set_up_log
    from moshivis.serve.static import PAGE
    from moshivis.serve.tls import given, self_signed

    token = arguments.token or os.environ.get("MOSHIVIS_TOKEN") or None
    limits = Limits(
        sessions=arguments.sessions,
        queue=arguments.queue,
        origins=tuple(arguments.origin),
        token=token,
        session_s=arguments.session_seconds,
        idle_s=arguments.idle_seconds,
    )
    limits.check()
    certificate = None
    if arguments.tls is not None:
        certificate = given(*arguments.tls)
    elif arguments.tls_self_signed is not None:
        certificate = self_signed(arguments.tls_self_signed or None, arguments.host)
    sockets = bind(arguments.host, arguments.port)
    local = is_local(arguments.host)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for warning in _warnings(local, certificate is not None, token is not None):
        console.print(f"moshivis: {warning}", style="yellow")

    status = console.status(escape(f"loading the model {arguments.model}"))
    status.start()
    try:
        assistant = load(
            arguments.model,
            device=arguments.device,
            dtype=dtype_named(arguments.dtype),
            download=arguments.download,
            adapters=arguments.adapters,
        )
        if assistant.emulated and limits.sessions > 1:
            console.print(f"moshivis: {EMULATED}", style="yellow")
        threads = arguments.threads or assistant.threads
        hall = Hall(Engine(assistant, limits.sessions, threads=threads), limits, Metrics())
        status.update("warming up")
        set_up_log()
        address = url(arguments.host, sockets[0].getsockname()[1], tls=certificate is not None, token=token)

        def on_ready() -> None:
            status.stop()
            print(f"moshivis serves {assistant.config.name} at {address}", flush=True)
            if arguments.open:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

        run_server(
            hall,
            sockets,
            certificate=certificate,
            page=None if arguments.no_page else PAGE,
            names=[arguments.host] if local else None,
            on_ready=on_ready,
        )
    finally:
        status.stop()
        for bound in sockets:
            bound.close()
    atexit.register(leave, 0)
    return 0


def _warnings(local: bool, tls: bool, token: bool) -> list[str]:
    if local:
        return []
    warnings = []
    if not tls:
        warnings.append(
            "without TLS, browsers on other machines give no microphone to the page; add --tls-self-signed, "
            "or reach the server through an SSH tunnel"
        )
    if not token:
        warnings.append("everybody who reaches this machine can use the server; add --token")
    return warnings
