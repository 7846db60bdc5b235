"""Ten restarts of three servers behind HAProxy, one after another, while `millpond load` goes on.

    cargo build --release
    /usr/bin/python3 tests/haproxy/rolling.py [--restarts N]

What it promises, each time it passes:

- Not one echo failed: every connection was made, and every byte sent came back.
- HAProxy had taken each server out before its lame duck was over, and had to try no connection twice.
- Each server drained clean: exit code 0, nothing cut, as many bytes out as in.
- The servers' reports together come to what the load, and the clients below, say that they sent.
- A server that came back while clients hold connections to the others is not sent every newcomer: its weight begins small,
  never falls, and comes to be that of the others.

HAProxy runs with deploy/haproxy/haproxy.cfg as it is shipped; addresses and times come from the environment. It needs `haproxy`,
listens on loopback only, takes three quarters of a minute, and leaves nothing running.
"""

import argparse
import asyncio
import csv
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests/common"))

from programs import PATIENCE, Failed, Report, Stage, until  # noqa: E402  (the path comes first)

# Where Debian puts it, which is not on everybody's path.
HAPROXY = "/usr/sbin/haproxy"
CONFIGURATION = os.path.join(ROOT, "deploy/haproxy/haproxy.cfg")
SERVERS = 3

# Long against two checks that fail one after the other, also on a machine that is busy with something else.
INTER_MS = 200
LAME_DUCK = 2

# A connection for each message: it is opened, and closed by the client. More than the few that are under way at any moment,
# and not so many that the machine itself is the limit.
LOAD = ["--churn", "--connections", "30", "--rate", "250", "--size", "1..64KiB", "--timeout", "20s", "--seed", "7"]

# Long enough that its beginning is not over when it is looked at; steps are a second.
SLOW_START = 6
# Held while one server of three is away, and newcomers when it is back: without a slow start, it would get all of these.
HELD, NEWCOMERS = 80, 20

REPORT = re.compile(
    r"(\d+) connections at the drain: .* (\d+) cut; drained in .*; (\d+) connections, (\d+) bytes in and (\d+) bytes out"
)


class Pond:
    """A place among HAProxy's servers, with one server after another in it."""

    def __init__(self, number):
        self.number = number
        # An address of its own: its ports are never taken by anybody's outgoing connections while it is away.
        self.host = f"127.0.0.{number + 1}"
        self.listen, self.metrics = free_port(self.host), free_port(self.host)
        self.starts = 0
        self.program = None

    @property
    def name(self):
        return f"pond{self.number}"

    def environment(self):
        prefix = f"MILLPOND_{self.number}"
        return {
            f"{prefix}_LISTEN": f"{self.host}:{self.listen}",
            f"{prefix}_HOST": self.host,
            f"{prefix}_METRICS_PORT": self.metrics,
        }

    async def start(self, run):
        self.starts += 1
        command = [run.millpond, "--listen", f"{self.host}:{self.listen}", "--metrics", f"{self.host}:{self.metrics}"]
        command += ["--workers", "8", "--lame-duck", f"{run.lame_duck}s", "--drain-timeout", "10s"]
        self.program = run.stage.start(f"{self.name}-{self.starts}", command)
        await self.program.says(r"metrics on http")


class Run:
    """The servers, HAProxy before them, and the load on it."""

    def __init__(self, stage, build, lame_duck):
        self.stage = stage
        self.millpond = os.path.join(build, "millpond")
        self.lame_duck = lame_duck
        self.ponds = [Pond(number) for number in range(1, SERVERS + 1)]
        self.address = f"127.0.0.{SERVERS + 2}"
        self.address += f":{free_port(self.address)}"
        self.socket = os.path.join(stage.folder, "haproxy.sock")
        # Of every server that has ended: its exit code, and the numbers of its report.
        self.ended = []
        self.taken_out = []
        # Clients that hold their connections, beside the load.
        self.clients = []

    async def start(self):
        for pond in self.ponds:
            await pond.start(self)
        environment = {"MILLPOND_HAPROXY_BIND": self.address, "MILLPOND_HAPROXY_SOCKET": self.socket}
        environment |= {"MILLPOND_HAPROXY_INTER": f"{INTER_MS}ms", "MILLPOND_HAPROXY_SLOWSTART": f"{SLOW_START}s"}
        for pond in self.ponds:
            environment |= pond.environment()
        pairs = [f"{name}={value}" for name, value in environment.items()]
        self.haproxy = self.stage.start("haproxy", ["env", *pairs, HAPROXY, "-db", "-f", CONFIGURATION])

        async def answers():
            if self.haproxy.process.poll() is not None:
                raise Failed(f"haproxy ended: {self.haproxy.log()}")
            return os.path.exists(self.socket)

        await until("haproxy is there", answers)
        for pond in self.ponds:
            await self.becomes(pond, "UP")

    def stat(self):
        """HAProxy's own numbers, by server."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(self.socket)
            connection.sendall(b"show stat\n")
            text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        return {row["svname"]: row for row in csv.DictReader(text.lstrip("# ").splitlines())}

    async def becomes(self, pond, status):
        async def is_so():
            # Also that it was checked: one that never was is taken to be up.
            row = self.stat()[pond.name]
            return row["status"] == status and row["check_status"] not in ("", "INI")

        await until(f"haproxy says that {pond.name} is {status}", is_so)

    async def restart(self, pond):
        start = time.monotonic()
        pond.program.process.send_signal(signal.SIGTERM)
        await self.becomes(pond, "DOWN")
        self.taken_out.append(time.monotonic() - start)
        await self.end(pond)
        await pond.start(self)
        await self.becomes(pond, "UP")

    async def hold(self, number):
        """Connects so many clients, each of which has had an echo, and keeps them."""
        host, port = self.address.rsplit(":", 1)
        for _ in range(number):
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), PATIENCE)
            self.clients.append(writer)
            writer.write(b"e")
            echo = await asyncio.wait_for(reader.read(1), PATIENCE)
            if echo != b"e":
                raise Failed(f"a client that holds its connection got {echo!r}")

    async def end(self, pond):
        code = await pond.program.exit_code()
        report = REPORT.search(pond.program.log())
        if not report:
            raise Failed(f"{pond.program.name} ended with code {code} and no report: {pond.program.log()}")
        self.ended.append((code, *map(int, report.groups())))


def free_port(host):
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def load_report(program):
    lines = [line for line in program.log().splitlines() if line.startswith("{")]
    if len(lines) != 1:
        raise Failed(f"the load gave no report: {program.log()}")
    return json.loads(lines[0])


async def roll(run, restarts, report):
    await run.start()
    load = run.stage.start("load", [run.millpond, "load", run.address, *LOAD, "--duration", "1h", "--json"])
    for number in range(restarts):
        sessions = int(run.stat()["FRONTEND"]["stot"])

        async def goes_on(before=sessions):
            if load.process.poll() is not None:
                raise Failed(f"the load ended: {load.log()}")
            return int(run.stat()["FRONTEND"]["stot"]) >= before + 50

        await until("the load goes on", goes_on)
        await run.restart(run.ponds[number % SERVERS])
    load.interrupt()
    code = await load.exit_code()
    echoes = load_report(load)
    newcomers, weights = await slow_start(run)
    stat = run.stat()
    for pond in run.ponds:
        pond.program.process.send_signal(signal.SIGTERM)
    for pond in run.ponds:
        await run.end(pond)

    kinds = {kind: count for kind, count in echoes["errors_by_kind"].items() if count}
    figure = f"{echoes['messages']} echoes, {echoes['errors']} failed {kinds or ''}".rstrip()
    report.claim(f"no echo fails in {restarts} restarts", code == 0 and echoes["errors"] == 0, figure)
    report.claim("the load is one to speak of", echoes["messages"] > 100 * restarts, f"{echoes['connections_opened']} connections")
    late = [seconds for seconds in run.taken_out if seconds >= run.lame_duck]
    slowest = f"{max(run.taken_out):.2f} s at most, of {run.lame_duck} s"
    report.claim("haproxy takes each out within its lame duck", not late, slowest)
    again = {name: int(row["wretr"]) + int(row["wredis"]) for name, row in stat.items() if name.startswith("pond")}
    report.claim("haproxy tries no connection twice", not any(again.values()), again)
    codes = [code for code, *_ in run.ended]
    report.claim("each server ends with code 0", set(codes) == {0}, codes)
    cut = sum(numbers[2] for numbers in run.ended)
    report.claim("nothing is cut", cut == 0, f"{cut} connections")
    accepted, received, sent = (sum(numbers[place] for numbers in run.ended) for place in (3, 4, 5))
    report.claim("the servers have sent all that they read", received == sent, f"{received} bytes in, {sent} out")
    # The load counts a message when its answer is whole. One that is not would be among the errors.
    # Each client that held a connection has sent one byte.
    opened, sent = echoes["connections_opened"] + len(run.clients), echoes["bytes"] + len(run.clients)
    figure = f"{accepted} connections and {received} bytes, of {opened} and {sent}"
    report.claim("their reports come to what the clients say", (accepted, received) == (opened, sent), figure)
    report.claim("who came back is sent a part of the newcomers", 0 < newcomers <= NEWCOMERS // 2, f"{newcomers} of {NEWCOMERS}")
    grows = weights[0] < 50 and weights == sorted(weights) and weights[-1] == 100 and len(weights) > 3
    report.claim("its weight grows to that of the others", grows, weights)


async def slow_start(run):
    """How many of the newcomers went to a server that had just come back, and its weights from then on, each once."""
    pond = run.ponds[0]
    pond.program.process.send_signal(signal.SIGTERM)
    await run.becomes(pond, "DOWN")
    await run.hold(HELD)
    await run.end(pond)
    await pond.start(run)
    await run.becomes(pond, "UP")
    weights = [int(run.stat()[pond.name]["weight"])]
    await run.hold(NEWCOMERS)
    newcomers = int(run.stat()[pond.name]["scur"])

    async def has_all():
        weight = int(run.stat()[pond.name]["weight"])
        if weight != weights[-1]:
            weights.append(weight)
        return weight == 100

    await until("haproxy gives back all of its share", has_all)
    return newcomers, weights


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default=os.path.join(ROOT, "target/release"), help="where cargo has put the program")
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--lame-duck", type=int, default=LAME_DUCK, help="seconds; too few, and the check must fail")
    arguments = parser.parse_args()
    report = Report()
    task = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with tempfile.TemporaryDirectory(prefix="millpond-") as folder, Stage(folder) as stage:
        run = Run(stage, arguments.build, arguments.lame_duck)
        try:
            await roll(run, arguments.restarts, report)
        except (Failed, OSError) as error:
            report.claim("the run goes to its end", False, error)
        except asyncio.CancelledError:
            report.claim("the run goes to its end", False, "it was interrupted")
        for client in run.clients:
            client.close()
        if report.failed:
            for program in stage.programs:
                print(f"-- the end of {program.name}'s log:", *program.log().splitlines()[-8:], sep="\n   ")
    print(f"rolling restart: {report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
