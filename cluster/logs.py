"""Where replicas log to."""

from __future__ import annotations

import logging

from actors.log_context import RequestFilter

SERVE = "ray.serve"


def log_as_serve_does() -> None:
    """Lines of this package go where those of Serve's replica go, at the same level and in the same form. Once, by a
    replica.
    """
    serve = logging.getLogger(SERVE)
    for name in ("actors", "cluster"):
        ours = logging.getLogger(name)
        ours.setLevel(serve.level)
        ours.propagate = False
        for handler in serve.handlers:
            ours.addHandler(handler)
    for handler in serve.handlers:
        # Handlers keep their filters; those of Serve do not know our requests.
        handler.addFilter(RequestFilter())
