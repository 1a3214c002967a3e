"""One name and its HTTPS port lead to a server of the test, in every Python process with this folder on its path.

Python imports a module of this name at start. ``ERNIE_TEST_SITE`` is name:address:port.
"""

import os
import socket

NAME, _, PLACE = os.environ.get("ERNIE_TEST_SITE", "").partition(":")
HTTPS = 443

if PLACE:
    ADDRESS, _, PORT = PLACE.partition(":")
    look_up, connect = socket.getaddrinfo, socket.create_connection

    def getaddrinfo(host, *arguments, **options):  # type: ignore[no-untyped-def]
        return look_up(ADDRESS if host == NAME else host, *arguments, **options)

    def create_connection(address, *arguments, **options):  # type: ignore[no-untyped-def]
        return connect((ADDRESS, int(PORT)) if address[:2] == (ADDRESS, HTTPS) else address, *arguments, **options)

    socket.getaddrinfo, socket.create_connection = getaddrinfo, create_connection  # type: ignore[assignment]
