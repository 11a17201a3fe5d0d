"""Python imports this at its start if this folder is on PYTHONPATH: connections beyond this machine are refused, and
listed in the file LSDC_LOOKS. A second file, <LSDC_LOOKS>.watched, has a line for each process that is watched."""

import os
import socket
import sys

HERE = ("", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname())


def _refuse(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else ""  # else a socket of this machine's file system
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host is not None and host not in HERE and not host.startswith("127."):
        with open(os.environ["LSDC_LOOKS"], "a") as looks:
            looks.write(f"{event} {host} by {' '.join(sys.argv)[:300]}\n")
        raise OSError(f"{event} {host}: no network in this test")


sys.addaudithook(_refuse)
with open(f"{os.environ['LSDC_LOOKS']}.watched", "a") as watched:
    watched.write(f"{' '.join(sys.orig_argv)[:300]}\n")
