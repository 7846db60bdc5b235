"""Programs under test, what is claimed of them, and the questions asked of Prometheus.

A program is known by its own process id, writes into files, and does not outlive the `Stage` it was started on, whatever
happens. Whatever is waited for is a condition with a deadline.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

# Long enough for a machine that is busy with something else; nothing here takes a tenth of it on one that is not.
PATIENCE = 30


class Failed(Exception):
    """Something did not happen that everything else needs."""


async def until(what, condition, seconds=PATIENCE):
    """Waits until `condition`, an async function, returns something true, and returns that."""
    deadline = time.monotonic() + seconds
    while True:
        value = await condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failed(f"not within {seconds} s: {what}")
        await asyncio.sleep(0.1)


class Program:
    """A process, from its start to its exit code."""

    def __init__(self, name, command, folder, descriptors=None):
        if descriptors is not None:
            # The shell becomes the program, so the process id stays the same.
            command = ["sh", "-c", f'ulimit -n {descriptors} && exec "$0" "$@"', *command]
        self.name = name
        self.log_path = os.path.join(folder, f"{name}.log")
        # Its own session: Ctrl-C at the terminal reaches this check, which ends its programs itself.
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started = time.monotonic()

    def log(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            return log.read()

    async def says(self, pattern):
        """The first match of `pattern` in what the program prints, once it is there."""

        async def printed():
            match = re.search(pattern, self.log())
            if not match and self.process.poll() is not None:
                raise Failed(f"{self.name} ended with code {self.process.returncode}")
            return match

        return await until(f"{self.name} prints {pattern!r}", printed)

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    async def exit_code(self):
        async def ended():
            return self.process.poll() is not None

        await until(f"{self.name} ends", ended)
        return self.process.returncode

    def kill(self):
        """Ends it at once, if it has not ended by itself. What it leaves behind is in the stage's folder."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Report:
    """The claims, one line each."""

    def __init__(self):
        self.passed = self.failed = 0

    def claim(self, what, holds, figure):
        if holds:
            self.passed += 1
        else:
            self.failed += 1
        print(f"{'ok    ' if holds else 'FAILED'} {what}: {figure}", flush=True)


class Stage:
    """Where programs run. Leaving the `with` block ends all that still do."""

    def __init__(self, folder):
        self.folder = folder
        self.programs = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for program in self.programs:
            program.kill()

    def start(self, name, command, descriptors=None):
        program = Program(name, command, self.folder, descriptors)
        self.programs.append(program)
        return program


class Prometheus:
    """A running Prometheus, by its HTTP interface."""

    def __init__(self, address):
        self.base = f"http://{address}/api/v1/"
        # Whatever proxy the environment names, it is not the way to this machine.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path, **parameters):
        url = self.base + path + "?" + urllib.parse.urlencode(parameters)
        try:
            with self.opener.open(url, timeout=PATIENCE) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise Failed(f"{json.load(error)['error']}: {parameters}") from error

    def instant(self, query, at=None):
        """The series that answer now, or then: each with its labels and its one sample."""
        when = {} if at is None else {"time": at}
        series = self.get("query", query=query, **when)["result"]
        return [{"labels": one["metric"], "samples": [sample(one["value"])]} for one in series]

    def range(self, query, start, end):
        """The series that answer from `start` to `end`, a second apart."""
        series = self.get("query_range", query=query, start=start, end=end, step=1)["result"]
        return [{"labels": one["metric"], "samples": [sample(pair) for pair in one["values"]]} for one in series]

    def value(self, query, at=None):
        """The one number that a query comes to, or None."""
        series = self.instant(query, at)
        if len(series) > 1:
            raise Failed(f"{len(series)} series and not one: {query}")
        return series[0]["samples"][0][1] if series else None

    async def becomes(self, what, query, condition, seconds=PATIENCE):
        """Waits until the query's one number meets a condition, and returns it."""
        found = []

        async def met():
            value = await asyncio.to_thread(self.value, query)
            found[:] = [value]
            return value is not None and condition(value)

        await until(what, met, seconds)
        return found[0]


def sample(pair):
    return [float(pair[0]), float(pair[1])]
