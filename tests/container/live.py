"""Runs the image as an engine does: with its files as a read-only root and no others, and with its user and environment. It is
process 1 of its namespace, has no privileges, and no network but loopback.

Takes the configuration of the image and the folder of its files. To be started as the first process of a process and a
network namespace of its own, as root: what it leaves behind ends with it. (A process that changes its user no longer ends
with its parent, so `--kill-child` would not do.)
"""

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, os.path.join(ROOT, "tests", "common"))
from programs import PATIENCE, Failed, Report, Stage, until

# Makes the root as an engine does, drops all rights, and runs the program by `exec`, so that it keeps process id 1.
AS_AN_ENGINE = """
root=$1 user=$2 proc=$3
shift 3
mount --bind "$root" "$root"
if [ "$proc" = proc ]; then mount -t proc -o nosuid,nodev,noexec proc "$root/proc"; fi
mount -o remount,bind,ro,nosuid,nodev "$root"
exec setpriv --no-new-privs chroot --userspec="$user" "$root" "$@"
"""
NAMESPACES = ["--mount", "--pid", "--ipc", "--uts", "--fork", "--propagation", "private"]

# No proxy of the environment leads to this machine.
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def loopback_up():
    """What `ip link set lo up` does: SIOCSIFFLAGS with IFF_UP and IFF_RUNNING."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH22x", b"lo", 0x41))


def get(path):
    """The answer of the side HTTP port."""
    with HTTP.open(f"http://127.0.0.1:9464{path}", timeout=PATIENCE) as answer:
        return answer.read().decode()


def sample(series):
    found = re.search(rf"^{re.escape(series)} (\S+)$", get("/metrics"), re.MULTILINE)
    return float(found[1]) if found else None


async def becomes(series, value):
    async def is_so():
        return sample(series) == value

    await until(f"{series} is {value}", is_so)


def client():
    return socket.create_connection(("127.0.0.1", 15000), timeout=PATIENCE)


def echoed(message):
    with client() as connection:
        connection.sendall(message)
        return connection.recv(len(message), socket.MSG_WAITALL)


class Container:
    """The image as a process, from its start to its exit code."""

    def __init__(self, stage, name, image, proc=True, **variables):
        self.config, self.files = image
        self.environment = [*self.config["Env"], *(f"MILLPOND_{key}={value}" for key, value in variables.items())]
        arguments = [self.files, self.config["User"], "proc" if proc else "none", *self.config["Entrypoint"]]
        inside = ["env", "-i", *self.environment, "sh", "-euc", AS_AN_ENGINE, "engine", *arguments]
        self.program = stage.start(name, ["unshare", *NAMESPACES, *inside])

    async def starts(self):
        await self.program.says("metrics on http")
        # The child of `unshare`.
        parent = self.program.process.pid
        with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as children:
            self.pid = int(children.read())

    def status(self, field):
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            return re.search(rf"^{field}:[ \t]*(.*)$", status.read(), re.MULTILINE)[1]

    def health(self, *more):
        """The image's health check as an engine runs it: in the container, as its user, in its environment."""
        user, group = self.config["User"].split(":")
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--ipc", "--uts", "--root", "--wd"]
        asked = self.config["Healthcheck"]["Test"][1:]
        done = subprocess.run(
            [*enter, f"--setuid={user}", f"--setgid={group}", *asked, *more],
            env=dict(line.split("=", 1) for line in self.environment),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return done.returncode, (done.stdout + done.stderr).strip()

    def stop(self):
        os.kill(self.pid, getattr(signal, self.config["StopSignal"]))

    async def ends(self):
        """Waits for its end, and returns the exit code and the last line of its log."""
        code = await self.program.exit_code()
        return code, self.program.log().splitlines()[-1]


async def confined(claim, stage, image):
    """The container is confined as it should be, and works with nothing around it."""
    container = Container(stage, "confined", image, WORK="2s")
    await container.starts()
    numbers = container.status("NSpid").split()
    claim("it is process 1", numbers[-1] == "1" and len(numbers) > 1, numbers)
    user, group = container.config["User"].split(":")
    nobody = {"Uid": "\t".join([user] * 4), "Gid": "\t".join([group] * 4), "Groups": "", "NoNewPrivs": "1"}
    nobody |= dict.fromkeys(("CapPrm", "CapEff", "CapAmb"), "0" * 16)
    rights = {field: container.status(field).strip() for field in nobody}
    claim("it is not root, and can never be", rights == nobody, rights)
    root = f"/proc/{container.pid}/root/"
    around = sorted(os.listdir(root))
    alone = around == ["millpond", "proc"] and os.statvfs(root).f_flag & os.ST_RDONLY
    claim("its root is empty but for the program, and read-only", alone, around)
    threads, workers = int(container.status("Threads")), sample('millpond_pool_workers{pool="echo"}')
    claim("it has the threads that compose.yaml makes room for", workers < threads <= workers + 16, threads)
    memory = sample("process_resident_memory_bytes")
    claim("it knows its own process", memory and memory > 1e6, f"{memory} bytes resident")
    for more in ([], ["--ready"]):
        answer = container.health(*more)
        claim(f"its health check says yes {more}", answer == (0, ""), answer)

    # The signal comes while a worker holds a message.
    with client() as held:
        held.sendall(b"before the signal")
        await becomes('millpond_pool_workers_busy{pool="echo"}', 1)
        container.stop()
        await becomes('millpond_phase{phase="draining"}', 1)
        answer = container.health()
        claim("a server that drains is alive", answer == (0, ""), answer)
        code, said = container.health("--ready")
        claim("and not ready", code == 1 and "503: draining" in said, said)
        answer = held.recv(100)
        claim("what was read before the signal is answered", answer == b"before the signal", answer)
        claim("and then the end", held.recv(100) == b"", "no reset")
    code, last = await container.ends()
    claim("it ends with exit code 0", code == 0, code)
    claim("the last line of its log is the report", "17 bytes in and 17 bytes out" in last, last)


async def abandoned(claim, stage, image):
    """The kernel delivers only signals with a handler to process 1. The program handles these."""
    container = Container(stage, "abandoned", image, WORK="1h", DRAIN_TIMEOUT="1h")
    await container.starts()
    with client() as held:
        held.sendall(b"an hour of work")
        await becomes('millpond_pool_workers_busy{pool="echo"}', 1)
        container.stop()
        await container.program.says("signal: draining")
        # Signals within a second of the first belong to the same stop.
        await asyncio.sleep(1.1)
        container.stop()
        code, last = await container.ends()
    claim("a signal a second after the first ends it at once", code == 130, f"{code}: {last}")


async def without_proc(claim, stage, image):
    """Without /proc, which an engine mounts, only the metrics that are read from it are missing."""
    container = Container(stage, "without_proc", image, proc=False)
    await container.starts()
    answer = echoed(b"hello")
    claim("it echoes without /proc", answer == b"hello", answer)
    seen = sample("millpond_received_bytes_total"), sample("process_resident_memory_bytes")
    claim("it is scraped, without the numbers of its process", seen == (5, None), seen)
    answer = container.health()
    claim("its health check needs none", answer == (0, ""), answer)
    container.stop()
    code, last = await container.ends()
    claim("it drains without /proc", code == 0, f"{code}: {last}")


async def without_ipv6(claim, stage, image):
    """As in most containers, the program can listen on [::], and ::1 cannot be reached."""
    try:
        with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w", encoding="ascii") as disable:
            disable.write("1")
    except OSError as error:
        raise Failed(f"IPv6 cannot be taken away, which needs a kernel that has it: {error}") from error
    container = Container(stage, "without_ipv6", image, METRICS="[::]:9464")
    await container.starts()
    answer = container.health()
    claim("health asks IPv4 where [::] has no IPv6", answer == (0, ""), answer)
    container.stop()
    code, last = await container.ends()
    claim("and it drains", code == 0, f"{code}: {last}")


async def main():
    if os.getpid() != 1:
        sys.exit("this is to be process 1 of a namespace that ends with it; tests/container/check starts it so")
    with open(sys.argv[1], encoding="utf-8") as file:
        image = json.load(file)["config"], sys.argv[2]
    # An engine adds this folder only.
    os.makedirs(os.path.join(image[1], "proc"), exist_ok=True)
    loopback_up()
    report = Report()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="millpond-container-") as folder, Stage(folder) as stage:
        try:
            for scene in (confined, abandoned, without_proc, without_ipv6):
                await scene(report.claim, stage, image)
        except (Failed, OSError, subprocess.SubprocessError) as failure:
            report.claim("everything happens", False, repr(failure))
        if report.failed:
            for program in stage.programs:
                print(f"-- {program.name}:\n{program.log()}")
    print(f"the container: {report.passed} passed, {report.failed} failed, in {time.monotonic() - start:.1f} s")
    sys.exit(report.failed > 0)


asyncio.run(main())
