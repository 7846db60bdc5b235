"""The dashboard, the rules and the alerts, answered by a real Prometheus that scrapes real servers under load.

    cargo build --release --bin millpond && cargo build --example faulty
    /usr/bin/python3 tests/dashboards/live.py [--save FILE]

What it promises, each time it passes:

- Every query of every panel, annotation and recording rule has an answer, and no sample of it is NaN or infinite.
- Every alert has fired, for the instances it is about and for no other. Durations are shortened by the table below.
- The values are what the traffic was: utilization, depth, refusals, latency, panics and the drain are compared with what
  the clients saw and the exit codes said.
- Every metric that a server exports is used by a panel or a rule, and every one used is exported.

It needs `prometheus`, listens on loopback only, takes a minute and a half, and leaves nothing running. The answers are saved
for `preview.py`.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests/common"))

from clients import Clients, within  # noqa: E402  (the path comes first)
from programs import Failed, Prometheus, Report, Stage, until  # noqa: E402

DASHBOARD = os.path.join(ROOT, "dashboards/millpond.json")
RULES = os.path.join(ROOT, "dashboards/prometheus")

# What is replaced in the files as they are shipped, so that a minute does for what takes days. With a scrape each second
# instead of one in 15, most windows shrink to a sixtieth. Each entry must be found, and no other long duration may be left.
SHORTENED = {
    "prometheus.yml": [
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
    ],
    "rules.yml": [
        ("[5m]", "[5s]"),
        ("[30m]", "[30s]"),
        ("[1h]", "[60s]"),
        # Longer than the run: only what there is counts, as in the first days of any Prometheus.
        ("[6h]", "[120s]"),
        ("[3d]", "[180s]"),
    ],
    "alerts.yml": [
        ("for: 1m", "for: 1s"),
        # More than one scrape that comes too late on a machine that is busy with something else.
        ("for: 2m", "for: 4s"),
        ("for: 5m", "for: 5s"),
        ("for: 10m", "for: 10s"),
        # Two scrapes at least, as the rule asks for, even when one is late.
        ("[2m]", "[4s]"),
        ("[15m]", "[15s]"),
        # Four starts, each waited for.
        ("[30m]", "[60s]"),
        # 30 s past its deadline is a bug that cannot be had on purpose. Here every drain is stuck from its beginning.
        ("deadline_timestamp_seconds > 30", "deadline_timestamp_seconds > -60"),
    ],
}
LONG = re.compile(r"\[\d+[mhd]\]|for: \d+[mhd]|interval: (?!1s)\S+")

# The servers, and what each goes through.
CAST = {
    "steady": "light traffic, and nothing happens to it",
    "busy": "40 clients on 4 workers, then a drain within its deadline",
    "full": "as many connections as its descriptors allow, and a crowd at the door",
    "stuck": "one worker in a job that does not end, and nine clients behind it",
    "faulty": "a service that panics at a marker",
    "restarting": "four starts",
}

# For which instances each alert fires while the load lasts, by the names above. "" is an alert about the whole job.
FIRES = {
    "MillpondDown": {"busy", "stuck"},
    "MillpondAbsent": {""},
    "MillpondWorkersSaturated": {"busy", "stuck"},
    "MillpondQueueSaturated": {"stuck"},
    "MillpondNoProgress": {"stuck"},
    "MillpondWorkerStuck": {"stuck"},
    "MillpondRefusing": {"full"},
    "MillpondWaitBudgetBurn": {""},
    "MillpondDrainStuck": {"busy", "stuck"},
    "MillpondPanics": {"faulty"},
    "MillpondDescriptorsNearLimit": {"full"},
    "MillpondRestarting": {"restarting"},
}
# Where it depends on the moment of a scrape: a server that starts again is down for a moment, after a short drain.
MAY_FIRE = {"MillpondDown": {"restarting"}, "MillpondDrainStuck": {"restarting"}}

BUSY_CLIENTS, BUSY_WORKERS = 40, 4
DESCRIPTORS = 192
STARTS = 4

# What Grafana puts for $__rate_interval when samples are a second apart.
RATE_INTERVAL = 4


# The files, and what is asked.


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def shortened(name):
    """A file of dashboards/prometheus/ with its durations shortened."""
    text = read(os.path.join(RULES, name))
    for old, new in SHORTENED[name]:
        if old not in text:
            raise Failed(f"{name} has no `{old}` to shorten")
        text = text.replace(old, new)
    left = LONG.search(text)
    if left:
        raise Failed(f"{name} has `{left[0]}`, which nothing shortens")
    return text


def configuration(targets):
    """prometheus.yml with our servers in place of the one it comes with."""
    one = '      - targets: ["127.0.0.1:9464"]\n'
    text = shortened("prometheus.yml")
    if one not in text:
        raise Failed(f"prometheus.yml has no `{one.strip()}`")
    each = "      - targets: [\"{1}\"]\n        labels: {{instance: {0}}}\n"
    return text.replace(one, "".join(each.format(*item) for item in targets.items()))


def panels(dashboard):
    """Every panel, those of a folded row too."""
    for panel in dashboard["panels"]:
        for each in [panel, *panel.get("panels", [])]:
            if each["type"] != "row":
                yield each


def targets(dashboard):
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield panel, target


def annotations(dashboard):
    return [one for one in dashboard["annotations"]["list"] if "expr" in one]


def filled_in(query, span, rate=RATE_INTERVAL, instance=".+", pool=".+"):
    """A query as Grafana would send it."""
    values = {
        "$__rate_interval": f"{rate}s",
        "$__range": f"{span}s",
        "$job": ".+",
        "$instance": instance,
        "$pool": pool,
    }
    for variable, value in values.items():
        query = query.replace(variable, value)
    return query


def query_of(dashboard, title, reference="A"):
    for panel, target in targets(dashboard):
        if panel["title"] == title and target["refId"] == reference:
            return target["expr"]
    raise Failed(f"the dashboard has no panel `{title}` with a query {reference}")


# The run.


class Server:
    """An echo server, and where it listens."""

    def __init__(self, program):
        self.program = program
        self.echo = self.metrics = None

    @classmethod
    async def start(cls, stage, name, command, descriptors=None):
        server = cls(stage.start(name, command, descriptors))
        server.echo = (await server.program.says(r"echo on (127\.0\.0\.1:\d+)\n"))[1]
        server.metrics = (await server.program.says(r"metrics on http://(127\.0\.0\.1:\d+)/metrics\n"))[1]
        return server


class Run:
    """The servers, their clients, and the moments that matter later."""

    def __init__(self, stage, program, faulty):
        self.stage = stage
        self.program = program
        self.faulty = faulty
        self.servers = {}
        self.clients = {}
        self.prometheus = None
        self.exit_codes = {}
        self.begin = time.time()

    def note(self, what):
        print(f"{time.time() - self.begin:6.1f} s  {what}", flush=True)

    async def millpond(self, name, *flags, listen="127.0.0.1:0", metrics="127.0.0.1:0", descriptors=None):
        command = [self.program, "--listen", listen, "--metrics", metrics, *flags]
        self.servers[name] = await Server.start(self.stage, name, command, descriptors)

    async def everything_starts(self):
        await self.millpond("steady", "--workers", "4")
        await self.millpond("busy", *f"--workers {BUSY_WORKERS} --work 40ms --lame-duck 8s --drain-timeout 30s".split())
        await self.millpond("full", *"--workers 4 --overload reject".split(), descriptors=DESCRIPTORS)
        await self.millpond("stuck", *"--workers 1 --work 10m --max-connections 10 --drain-timeout 3s".split())
        await self.millpond("restarting", "--workers", "1")
        self.servers["faulty"] = await Server.start(self.stage, "faulty", [self.faulty])
        self.clients = {name: Clients(server.echo) for name, server in self.servers.items()}
        await self.prometheus_starts()

    async def prometheus_starts(self):
        folder = self.stage.folder
        texts = {name: shortened(name) for name in ("rules.yml", "alerts.yml")}
        texts["prometheus.yml"] = configuration({name: one.metrics for name, one in self.servers.items()})
        for name, text in texts.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        program = self.stage.start(
            "prometheus",
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                "--web.listen-address=127.0.0.1:0",
            ],
        )
        address = (await program.says(r'msg="Listening on"[^\n]* address=(127\.0\.0\.1:\d+)'))[1]
        self.prometheus = Prometheus(address)
        await program.says("Server is ready to receive web requests")
        # Each is scraped before it is used: a rise is only seen from a number that was there before.
        await self.becomes("all are scraped", "sum(up)", lambda up: up == len(self.servers))
        # Until it knew of any, MillpondAbsent was right.
        await self.becomes("alerts firing", 'count(ALERTS{alertstate="firing"}) or vector(0)', lambda alerts: alerts == 0)

    async def becomes(self, what, query, condition, seconds=30):
        value = await self.prometheus.becomes(what, query, condition, seconds)
        self.note(f"{what}: {value:g}")
        return value

    def steady_traffic(self):
        """A few messages, in waves so that a plot has a shape, and a short connection now and then."""
        clients = self.clients["steady"]
        waves = [0.06 + 0.05 * math.sin(step / 12) for step in range(200)]
        for number in range(2):
            lengths = [200 * (1 + (step * (number + 1)) % 60) for step in range(61)]
            clients.run(clients.talk(itertools.cycle(lengths), itertools.cycle(waves)))
        clients.run(clients.visit_again_and_again(0.2))
        self.clients["faulty"].run(self.clients["faulty"].visit_again_and_again(0.3))

    async def stuck_workers(self):
        """One job that does not end, and nine behind it."""
        clients = self.clients["stuck"]
        for _ in range(10):
            clients.run(clients.talk([20], [0]))
        depth = 'millpond_pool_queue_depth{instance="stuck", pool="echo"}'
        await self.becomes("jobs wait behind a stuck worker", depth, lambda n: n == 9)

    async def saturated_workers(self):
        """More clients than workers, each with a message under way at all times."""
        clients = self.clients["busy"]
        for _ in range(BUSY_CLIENTS):
            clients.run(clients.talk(itertools.repeat(64), itertools.repeat(0)))
        waiting = BUSY_CLIENTS - BUSY_WORKERS
        depth = 'millpond_pool_queue_depth{instance="busy", pool="echo"}'
        await self.becomes("jobs wait for busy workers", depth, lambda n: n == waiting)
        # The windows of the rates are filled from now on.
        self.saturated_from = time.time() + RATE_INTERVAL

    async def full_server(self):
        """As many idle connections as there may be, and then a crowd at the door."""
        clients = self.clients["full"]
        limit = self.prometheus.value('millpond_connections_limit{instance="full"}')
        while len(clients.held) < limit:
            connection = await clients.arrive(b"here to stay")
            if connection is None:
                raise Failed(f"refused after {len(clients.held)} connections of {limit:g}")
            clients.held.append(connection)
            await asyncio.sleep(0.03)
        await self.becomes("connections at the limit", 'sum(millpond_connections{instance="full"})', lambda n: n == limit)
        clients.run(clients.crowd(0.08))
        self.crowded_from = time.time() + 1

    async def restarts(self):
        server = self.servers["restarting"]
        started = 'process_start_time_seconds{instance="restarting"}'
        before = self.prometheus.value(started)
        for start in range(2, STARTS + 1):
            server.program.interrupt()
            code = await server.program.exit_code()
            if code != 0:
                raise Failed(f"the restarting server ended with code {code}")

            # The time of a start is exported in whole seconds.
            async def another_second(program=server.program):
                return time.monotonic() > program.started + 1.1

            await until("another second", another_second)
            await self.millpond("restarting", "--workers", "1", listen=server.echo, metrics=server.metrics)
            server = self.servers["restarting"]
            self.note(f"start {start}")
            before = await self.prometheus.becomes("it is scraped", started, lambda value, before=before: value > before)

    async def saturated_workers_drain(self):
        busy, clients = self.servers["busy"], self.clients["busy"]
        phase = 'sum_over_time(millpond_phase{{instance="busy", phase="{}"}}[1m])'
        self.saturated_to = time.time()
        busy.program.interrupt()
        await self.becomes("scrapes of the lame duck", phase.format("lame_duck"), lambda n: n >= 3)

        async def drain_is_seen():
            # A client that is kept waiting for the processor looks silent, and the drain then ends before it is asked to.
            ended = busy.program.process.poll() is not None
            if not ended:
                # Everything is going on at this moment: it is the picture's right edge.
                self.now = time.time()
            return ended or (self.prometheus.value(phase.format("draining")) or 0) >= 9

        await until("the drain is scraped nine times", drain_is_seen)
        self.note("the drain has been seen")
        await clients.stop()
        self.exit_codes["busy"] = await busy.program.exit_code()
        self.note("the busy server has drained")

    async def stuck_workers_drain(self):
        self.servers["stuck"].program.interrupt()
        self.exit_codes["stuck"] = await self.servers["stuck"].program.exit_code()
        await self.clients["stuck"].abandon()
        self.note("the stuck server has given up")
        for name in ("busy", "stuck"):
            await self.fires("MillpondDown", name)

    async def fires(self, alert, instance, seconds=30):
        query = f'count(ALERTS{{alertname="{alert}", instance="{instance}", alertstate="firing"}})'
        await self.becomes(f"{alert} for {instance or 'the job'}", query, lambda n: n >= 1, seconds)

    async def clients_leave(self):
        """The last numbers are scraped once the clients have left."""
        for name in ("steady", "full", "faulty"):
            await self.clients[name].stop()
        left, scraped = time.time(), 'min(timestamp(up{instance=~"steady|full|faulty"}))'
        await self.prometheus.becomes("a scrape after that", scraped, lambda when: when > left)
        for name in ("steady", "full", "faulty"):
            closed = f'sum(millpond_connections{{instance="{name}"}})'
            await self.becomes(f"connections left at {name}", closed, lambda n: n == 0)
        self.counted_at = time.time()

    async def everything_ends(self):
        self.before_the_end = time.time()
        for name in ("steady", "full", "faulty", "restarting"):
            self.servers[name].program.interrupt()
        for name in ("steady", "full", "faulty", "restarting"):
            self.exit_codes[name] = await self.servers[name].program.exit_code()
        await self.fires("MillpondAbsent", "")
        self.end = time.time()

    async def act(self):
        await self.everything_starts()
        self.start = time.time()
        self.steady_traffic()
        await self.stuck_workers()
        # Time for a quiet beginning in the plots.
        await asyncio.sleep(8)
        await self.full_server()
        await self.saturated_workers()
        provoking = self.clients["faulty"]
        provoking.run(provoking.provoke(4))
        await self.restarts()
        # The one number that is not shortened is that a job has to run for over 60 s. The drain fills the end of that time.
        running = 'millpond_pool_longest_running_seconds{instance="stuck", pool="echo"}'
        await self.becomes("seconds in the stuck job", running, lambda seconds: seconds > 42, 100)
        self.crowded_to = time.time()
        await self.saturated_workers_drain()
        await self.fires("MillpondWorkerStuck", "stuck")
        await self.stuck_workers_drain()
        await self.clients_leave()
        await self.everything_ends()


# The claims.


def every_query_answers(run, report, dashboard):
    span = math.ceil(run.end - run.start)

    def over_the_run(name, query):
        claim_an_answer(report, name, query, lambda query: run.prometheus.range(query, run.start, run.end))

    for panel, target in targets(dashboard):
        # All pools, and the one that is chosen at first.
        for pool in (".+", "echo") if "$pool" in target["expr"] else (".+",):
            name = f"panel `{panel['title']}` {target['refId']}, pool {pool}"
            query = filled_in(target["expr"], span, pool=pool)
            over_the_run(name, query)
            if target.get("instant"):
                at_a_moment = f"{name}, at a moment"
                claim_an_answer(report, at_a_moment, query, lambda query: run.prometheus.instant(query, run.now))
    for annotation in annotations(dashboard):
        over_the_run(f"annotation `{annotation['name']}`", filled_in(annotation["expr"], span))
    for rule in rules(run, "recording"):
        over_the_run(f"rule {rule['name']}", rule["query"])
        over_the_run(f"rule {rule['name']}, as recorded", rule["name"])


def claim_an_answer(report, name, query, ask):
    """There is one, and all of it are numbers."""
    try:
        series = ask(query)
    except Failed as error:
        report.claim(name, False, error)
        return
    no_numbers = [
        f"{value} at {when:.0f} in {one['labels']}"
        for one in series
        for when, value in one["samples"]
        if not math.isfinite(value)
    ]
    if not series:
        report.claim(name, False, f"no answer to {query}")
    elif no_numbers:
        report.claim(name, False, f"{no_numbers[0]}, of {query}")
    else:
        count = sum(len(one["samples"]) for one in series)
        report.claim(name, True, f"{len(series)} series, {count} samples")


def rules(run, kind):
    groups = run.prometheus.get("rules")["groups"]
    return [rule for group in groups for rule in group["rules"] if rule["type"] == kind]


def every_alert_fires_where_it_should(run, report, _):
    sick = [rule["name"] for kind in ("recording", "alerting") for rule in rules(run, kind) if rule["health"] != "ok"]
    report.claim("every rule can be evaluated", not sick, ", ".join(sick) or "none has an error")
    fired = firing(run, run.end)
    for rule in rules(run, "alerting"):
        about = {"alertname": rule["name"], **rule["labels"]}
        times = [times for labels, times in fired if about.items() <= labels.items()]
        name = " ".join(about.values())
        report.claim(f"alert {name} has fired", bool(times), f"at {max(times):g} evaluations" if times else "it never did")
    # At the end all are stopped, and down.
    before = firing(run, run.before_the_end)
    for alert in sorted({rule["name"] for rule in rules(run, "alerting")}):
        fitting = set() if alert == "MillpondAbsent" else FIRES.get(alert, set())
        where = {labels.get("instance", "") for labels, _ in before if labels["alertname"] == alert}
        right = fitting <= where <= fitting | MAY_FIRE.get(alert, set())
        named = ", ".join(sorted(name or "the job" for name in where)) or "nowhere"
        report.claim(f"alert {alert} fired where it should, before the end", right, named)
    noisy = [labels["alertname"] for labels, _ in before if labels.get("instance") == "steady"]
    report.claim("no alert fired for the steady server", not noisy, ", ".join(noisy) or "none")


def firing(run, end):
    """The alerts that fired from the beginning until then: labels, and how many evaluations long."""
    query = f'count_over_time(ALERTS{{alertstate="firing"}}[{math.floor(end - run.start)}s])'
    series = run.prometheus.instant(query, end)
    return [(one["labels"], one["samples"][0][1]) for one in series]


def values_mean_what_the_traffic_was(run, report, dashboard):
    """Numbers of the panels beside those of the clients. A number that is missing is NaN, which is like no other."""
    span = math.ceil(run.end - run.start)

    def number(query, at):
        value = run.prometheus.value(query, at)
        return math.nan if value is None else value

    def panel(title, reference, instance, start, end):
        """The panel's number over a time, with one window for all of it."""
        query = query_of(dashboard, title, reference)
        return number(filled_in(query, span, int(end - start), instance, "echo"), end)

    def panel_samples(title, instance, start, end):
        query = filled_in(query_of(dashboard, title), span, instance=instance, pool="echo")
        return samples(run, query, start, end)

    utilization_and_depth(run, report, panel, panel_samples)
    latency(run, report, panel)
    refusals(run, report, panel, number)
    panics(run, report, dashboard, number)
    drains(run, report, panel_samples)


def utilization_and_depth(run, report, panel, panel_samples):
    start, end = run.saturated_from, run.saturated_to
    share = panel("Utilization by instance", "A", "busy", start, end)
    figure = f"{share:.4f} over {end - start:.0f} s"
    report.claim("utilization while saturated is 0.95 to 1.02", 0.95 <= share <= 1.02, figure)

    waiting = BUSY_CLIENTS - BUSY_WORKERS
    depth = panel_samples("Jobs waiting, and room for them", "busy", start, end)
    middle = sorted(depth)[len(depth) // 2]
    # A client may be between two messages for a moment.
    right = waiting - 1 <= middle <= max(depth) == waiting
    figure = f"{middle:g} in the middle of {len(depth)} scrapes, {min(depth):g} to {max(depth):g}"
    report.claim(f"{waiting} jobs wait, {BUSY_CLIENTS} clients less {BUSY_WORKERS} workers", right, figure)

    counts = set(samples(run, 'sum(millpond_connections{instance="busy"})', start, end))
    report.claim("open connections are the clients", counts == {BUSY_CLIENTS}, ", ".join(f"{n:g}" for n in sorted(counts)))


def latency(run, report, panel):
    start, end = run.saturated_from, run.saturated_to
    measured = run.clients["busy"].tally.latencies(start, end)
    measured = measured[int(0.99 * len(measured))]
    shown = panel("Echo latency: p50, p90, p99", "C", "busy", start, end)
    buckets = run.prometheus.instant('millpond_echo_latency_seconds_bucket{instance="busy"}', end)
    bounds = sorted(float(one["labels"]["le"]) for one in buckets)

    def bucket(value):
        return sum(bound < value for bound in bounds)

    apart = abs(bucket(measured) - bucket(shown))
    figure = f"{shown:.3f} s shown, {measured:.3f} s measured, {apart} buckets apart"
    report.claim("p99 of the echo latency within a bucket of the clients'", shown > 0 and apart <= 1, figure)


def refusals(run, report, panel, number):
    start, end = run.crowded_from, run.crowded_to
    tallies = [clients.tally for clients in run.clients.values()]
    refused = sum(within(tally.refused, start, end) for tally in tallies)
    came = refused + sum(within(tally.accepted, start, end) for tally in tallies)
    counted = refused / came
    shown = panel("Refused share", "A", ".+", start, end)
    figure = f"{shown:.4f} shown, {counted:.4f} counted: {refused} of {came}"
    report.claim("the refused share within 15 % of the clients'", abs(shown / counted - 1) <= 0.15, figure)
    for name in ("full", "steady", "faulty"):
        tally = run.clients[name].tally
        for what, metric, seen in (
            ("accepted", "millpond_connections_accepted_total", len(tally.accepted)),
            ("refused", "millpond_connections_rejected_total", len(tally.refused)),
        ):
            told = number(f'sum({metric}{{instance="{name}"}})', run.counted_at)
            figure = f"{told:g} told, {seen} counted"
            report.claim(f"connections {what} by {name}, exactly as its clients counted", told == seen, figure)
    descriptors = number('process_max_fds{instance="full"}', run.now)
    report.claim("the full server has the descriptors it was given", descriptors == DESCRIPTORS, f"{descriptors:g}")


def panics(run, report, dashboard, number):
    sent = len(run.clients["faulty"].tally.panicked)
    told = number('millpond_pool_jobs_total{instance="faulty", pool="echo", outcome="panicked"}', run.counted_at)
    report.claim("panics, exactly as many as markers were sent", told == sent > 0, f"{told:g} told, {sent} sent")
    so_far = math.ceil(run.counted_at - run.start)
    shown = number(filled_in(query_of(dashboard, "Panics"), so_far, pool="echo"), run.counted_at)
    report.claim("panics on the panel, to the nearest one", abs(shown - sent) < 1, f"{shown:.2f} shown, {sent} sent")


def drains(run, report, panel_samples):
    phases = [value for value, _ in itertools.groupby(panel_samples("Phase", "busy", run.start, run.end))]
    in_order = phases[:3] == [1, 2, 3] and phases[3:] in ([], [4])
    figure = ", ".join(f"{value:g}" for value in phases)
    report.claim("the busy server was serving (1), a lame duck (2), draining (3), in this order", in_order, figure)
    for name, code in run.exit_codes.items():
        expected = 3 if name == "stuck" else 0
        report.claim(f"exit code of {name} is {expected}", code == expected, code)
    for name in ("busy", "steady", "full"):
        said = re.search(r"(\d+) bytes in and (\d+) bytes out", run.servers[name].program.log())
        received, sent = map(int, said.groups()) if said else (None, None)
        back = run.clients[name].tally.bytes_back
        figure = f"{received}, {sent}, {back}"
        report.claim(f"bytes in, out and back at the clients of {name} are the same", received == sent == back, figure)
    cut = re.search(r"(\d+) cut;", run.servers["stuck"].program.log())
    report.claim("the stuck server has cut its ten connections", bool(cut) and cut[1] == "10", cut and f"{cut[1]} cut")


def samples(run, query, start, end):
    """The values of a query that answers with one series."""
    series = run.prometheus.range(query, start, end)
    if len(series) != 1:
        raise Failed(f"{len(series)} series and not one: {query}")
    return [value for _, value in series[0]["samples"]]


def names_agree(run, report, dashboard):
    """Every metric is used, and every one used is there."""
    series = run.prometheus.get("series", **{"match[]": '{instance="steady"}', "start": run.start, "end": run.end})
    stored = {one["__name__"] for one in series if one["__name__"].startswith("millpond_")}
    asked = [target["expr"] for _, target in targets(dashboard)]
    asked += [annotation["expr"] for annotation in annotations(dashboard)]
    asked += [rule["query"] for kind in ("recording", "alerting") for rule in rules(run, kind)]
    # A recorded name has a colon on either side.
    used = {name for query in asked for name in re.findall(r"(?<![:\w])millpond_\w+(?![:\w])", query)}
    missing = sorted(used - stored)
    report.claim("every metric used is exported", not missing, ", ".join(missing) or f"{len(used)} names")

    def family(name):
        base = re.sub("_(bucket|count|sum)$", "", name)
        return base if f"{base}_bucket" in stored else name

    families = {family(name) for name in stored}
    unused = sorted(families - {family(name) for name in used})
    report.claim("every metric exported is used", not unused, ", ".join(unused) or f"{len(families)} metrics")


def save(run, dashboard, path):
    """What the picture is drawn from: the dashboard as it opens, at the moment when everything goes on at once."""
    start, now = math.floor(run.start), math.floor(run.now)
    answers = {}
    for panel, target in targets(dashboard):
        query = filled_in(target["expr"], now - start, pool="echo")
        series = run.prometheus.instant(query, now) if target.get("instant") else run.prometheus.range(query, start, now)
        answers.setdefault(str(panel["id"]), {})[target["refId"]] = series
    marks = {
        one["name"]: run.prometheus.range(filled_in(one["expr"], now - start), start, now) for one in annotations(dashboard)
    }
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"cast": CAST, "start": start, "now": now, "panels": answers, "annotations": marks}, file)
    print(f"saved {path}")


async def check(run, report, dashboard, path):
    await run.act()
    everything = (every_query_answers, every_alert_fires_where_it_should, values_mean_what_the_traffic_was, names_agree)
    for claims in everything:
        try:
            claims(run, report, dashboard)
        except Failed as error:
            report.claim(claims.__name__.replace("_", " "), False, error)
    if report.failed == 0:
        save(run, dashboard, path)


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    programs = {"program": "target/release/millpond", "faulty": "target/debug/examples/faulty"}
    for name, path in programs.items():
        parser.add_argument(f"--{name}", default=os.path.join(ROOT, path), help=f"by default {path}")
    parser.add_argument("--save", default=os.path.join(ROOT, "target/dashboards.json"), help="where the answers go")
    arguments = parser.parse_args()
    # The clients of all servers are here.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    dashboard = json.loads(read(DASHBOARD))
    report = Report()
    task = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with tempfile.TemporaryDirectory(prefix="millpond-") as folder, Stage(folder) as stage:
        run = Run(stage, arguments.program, arguments.faulty)
        try:
            await check(run, report, dashboard, arguments.save)
        except (Failed, OSError, AssertionError) as error:
            report.claim("the run goes to its end", False, error)
            for program in stage.programs:
                print(f"-- the end of {program.name}'s log:", *program.log().splitlines()[-8:], sep="\n   ")
        except asyncio.CancelledError:
            report.claim("the run goes to its end", False, "it was interrupted")
    print(f"dashboards: {report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
