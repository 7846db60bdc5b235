"""Asks the program what the manifests rely on, and runs it with the environment that they set."""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests/common"))

from programs import PATIENCE, Failed, Stage, until  # noqa: E402  (the path comes first)


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


class Known:
    """Facts about the program and the project, which the manifests must agree with."""

    def __init__(self, millpond):
        # Every variable with its default, or None. The program reads no other variables, and does not report unknown ones.
        text = subprocess.run([millpond, "--help"], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        found = re.findall(r"\[env: (MILLPOND_[A-Z_]+)\](?:\s+\[default: ([^\]]+)\])?", text)
        self.defaults = {name: default or None for name, default in found}
        if "MILLPOND_LISTEN" not in self.defaults:
            raise Failed(f"--help names no variables: {text}")
        self.version = tomllib.loads(read("Cargo.toml"))["package"]["version"]
        alerts = read("dashboards/prometheus/alerts.yml")
        self.alert_jobs = set(re.findall(r'job="([^"]+)"', alerts))
        self.saturated = only(re.findall(r"pool:millpond_utilization:ratio_rate5m > ([0-9.]+)", alerts))
        self.bad_wait = only(re.findall(r'le="([0-9.]+)"', read("dashboards/prometheus/rules.yml")))
        # Filled in by `run`.
        self.answers = {}
        self.series = []


def only(found):
    """The number that all of them are equal to."""
    if len(set(found)) != 1:
        raise Failed(f"one number, and not {found}")
    return float(found[0])


async def run(millpond, manifests, known):
    """Starts the program as the pod would and ends it as the cluster does, up to the lame duck."""
    # The addresses differ from the pod's, whose ports may be taken on this machine.
    environment = manifests.environment | {"MILLPOND_LISTEN": "127.0.0.1:0", "MILLPOND_METRICS": "127.0.0.1:0"}
    pairs = [f"{name}={value}" for name, value in environment.items()]
    with tempfile.TemporaryDirectory() as folder, Stage(folder) as stage:
        program = stage.start("millpond", ["env", "-i", *pairs, millpond, *manifests.container.get("args", [])])
        try:
            base = (await program.says(r"metrics on (http://\S+)/metrics"))[1]
        except Failed as error:
            raise Failed(f"{error}, given the environment of the Deployment: {program.log()}") from error

        for path in ("/metrics", "/healthz", "/readyz"):
            known.answers[path], text = get(base + path)
            if path == "/metrics":
                known.series = [series(line) for line in text.splitlines() if line and not line.startswith("#")]

        program.process.terminate()

        async def not_ready():
            return get(base + "/readyz")[0] == 503

        await until("the pod is not ready once it is told to go", not_ready)
        # Liveness must stay 200 in the lame duck, or the kubelet would kill the pod.
        liveness = manifests.container["livenessProbe"]["httpGet"]["path"]
        if get(base + liveness)[0] != 200:
            raise Failed(f"{liveness} would have a pod killed in its lame duck")
        if program.process.poll() is not None:
            raise Failed("it did not stay for its lame duck")
        # Signals within a second of the first belong to the same stop.
        await asyncio.sleep(1.1)
        program.process.terminate()
        code = await program.exit_code()
        if code != 130:
            raise Failed(f"abandoned by a later signal, it ended with {code}: {program.log()}")


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url):
    try:
        with OPENER.open(url, timeout=PATIENCE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def series(line):
    name, _, labels = line.rpartition(" ")[0].partition("{")
    return name, dict(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', labels))


def run_all(millpond, renderings, known):
    for manifests in renderings.values():
        asyncio.run(run(millpond, manifests, known))
