"""A local HTTPS server in the place of the model cards' media host, and how a cluster gets to believe it."""

from __future__ import annotations

import contextlib
import http.server
import os
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trustme

HOST = "paddlenlp.bj.bcebos.com"
ADDRESS = "127.0.0.1"
NETWORK = "127.0.0.0/8"
FOLDER = "/datasets/paddlemix/demo_images/"
NAMES = Path(__file__).parent / "names"


@dataclass
class Site:
    """``asked`` are the paths that were fetched."""

    environment: dict[str, str]
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def media_site(folder: Path, pictures: dict[str, bytes]) -> Iterator[Site]:
    """Serves pictures by name below ``FOLDER``. A process with ``environment`` finds them under ``HOST``."""
    authority = trustme.CA()
    certificates = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(certificates))
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = pictures.get(self.path.removeprefix(FOLDER)) if self.headers["Host"] == HOST else None
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((ADDRESS, 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    path = os.pathsep.join(filter(None, [str(NAMES), os.environ.get("PYTHONPATH")]))
    environment = {
        "ERNIE_TEST_SITE": f"{HOST}:{ADDRESS}:{server.server_port}",
        "PYTHONPATH": path,
        "SSL_CERT_FILE": str(certificates),
    }
    try:
        yield Site(environment, asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
