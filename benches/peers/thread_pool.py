"""The classic recipe, to be compared with: an echo server on Python's ThreadPoolExecutor with 128 workers.

    python3 benches/peers/thread_pool.py 0

A connection holds its worker until the client leaves. Nothing is measured, and nothing is drained.
"""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor

WORKERS = 128
READ_SIZE = 64 * 1024


def echo(connection):
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while received := connection.recv(READ_SIZE):
                connection.sendall(received)
        except OSError:
            pass  # The client is gone.


def main():
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=4096) as listener:
        print("echo on %s:%d" % listener.getsockname(), flush=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            while True:
                connection, _ = listener.accept()
                pool.submit(echo, connection)


if __name__ == "__main__":
    main()
