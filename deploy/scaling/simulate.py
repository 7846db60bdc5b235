"""An autoscaler fed by the depth of a queue, against one fed by the age of its oldest job.

    /usr/bin/python3 deploy/scaling/simulate.py          # prints the tables
    /usr/bin/python3 deploy/scaling/simulate.py --check  # and fails if deploy/README.md or the chart says anything else

Three hours of jobs, seeded, the same for every policy. The scaler is the formula of Kubernetes' HorizontalPodAutoscaler with its
default behaviour. deploy/README.md has the tables and what they say, chart.py draws, and tests/scaling/model.py holds the model
to theory.

What is simplified:

- One queue for all instances, first come first served, as if the balancer were perfect. Jobs are independent: no connection
  ties the next one to an instance, so a new instance takes its share at once.
- Workers are what runs short, not processors: an instance more is WORKERS more, and slows no other down.
- An instance always takes START_UP to start, and never fails. One that leaves takes no job from then on; its workers end the ones
  they have, and are paid for until then. Which workers leave: those that are done first.
- Metrics are read when the scaler looks, and are never late; utilization is that of the last minute.
"""

import argparse
import bisect
import collections
import hashlib
import heapq
import math
import os
import random
import statistics
import sys
import typing

HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, "../README.md")
CHART = os.path.join(HERE, "scaling.svg")
SEEDS = (1, 2, 3, 4, 5)

# Seconds, unless a comment says otherwise.
DAY = 10_800.0
WORKERS = 4  # of an instance
OBJECTIVE = 2.0  # no job waits longer than that
SHORT, LONG, TINY = 0.5, 5.0, 0.05  # the mean of a job's time in its worker
RATE = 16.0  # jobs a second, around which the day swings
SWING = 0.5  # of RATE, up and down

START_UP = 45.0
FEWEST, MOST = 2, 40  # instances

# Kubernetes' own: `--horizontal-pod-autoscaler-sync-period`, `-tolerance`, and the default `behavior`.
SYNC = 15.0
TOLERANCE = 0.1
DOWN_WINDOW = 300.0
UP_FACTOR, UP_PODS = 2, 4  # in each SYNC, whichever is more

# Below it, few jobs wait: see "When to add what" in deploy/README.md.
BUSY = 0.7
RATE_WINDOW = 4  # looks, which is a minute
# A signal of at most so many targets doubles what is ready, and no more.
CLAMP = 2


class Phase(typing.NamedTuple):
    """From when on jobs are of this kind."""

    start: float
    # The mean time of one.
    service: float
    # How many times RATE.
    rate: float
    # How many come at once, in the mean.
    batch: int
    name: str


# What comes keeps so many workers busy, apart from the swing: 8; 16 in the burst; 20 with the long jobs, of which fewer come; 4
# with the tiny ones. Those come in lists: 40 are two seconds of work, which eight workers, the fewest, do in a quarter of one.
BURST, LONGER, SHORTER = "burst", "10x longer", "10x shorter"
LONG_RATE = 0.25


def phases(long_rate=LONG_RATE):
    return [
        Phase(0, SHORT, 1, 1, ""),
        Phase(2000, SHORT, 2, 1, BURST),
        Phase(2300, SHORT, 1, 1, ""),
        Phase(4200, LONG, long_rate, 1, LONGER),
        Phase(6600, SHORT, 1, 1, ""),
        Phase(8400, TINY, 5, 40, SHORTER),
        Phase(10200, SHORT, 1, 1, ""),
    ]


def swing(now):
    """The rate at this time of the day, as a multiple of the mean."""
    return 1 - SWING * math.cos(2 * math.pi * now / DAY)


def with_ends(all_phases):
    return zip(all_phases, [phase.start for phase in all_phases[1:]] + [DAY])


def day(seed, long_rate=LONG_RATE, until=DAY):
    """When each job comes, and how long it takes: Poisson arrivals at a rate that swings, and exponential times."""
    chance = random.Random(seed)
    arrivals, services = [], []
    for phase, end in with_ends([phase for phase in phases(long_rate) if phase.start < until]):
        end = min(end, until)
        most = RATE * phase.rate * (1 + SWING) / phase.batch
        now = phase.start + chance.expovariate(most)
        while now < end:
            # Thinned: kept with the share of `most` that the rate is at this moment.
            if chance.random() * (1 + SWING) < swing(now):
                # A batch has a geometric size.
                size = 1 if phase.batch == 1 else 1 + int(math.log(1 - chance.random()) / math.log(1 - 1 / phase.batch))
                arrivals += [now] * size
                services += [chance.expovariate(1 / phase.service) for _ in range(size)]
            now += chance.expovariate(most)
    return arrivals, services


class Fleet:
    """Workers that take jobs off one queue, first come first served. `run` moves its clock."""

    def __init__(self, arrivals, services, workers):
        self.arrivals, self.services = arrivals, services
        # When each worker is free: a heap. A worker that is free already keeps the moment it became so.
        self.free = [0.0] * workers
        # Of workers that have left: when the job they had ends.
        self.leaving = []
        self.now = 0.0
        self.started = 0
        # Of each job that has started, in the order they came.
        self.waits = []
        # Worker seconds: all that were there, and those in jobs, the running ones as far as they are.
        self.paid = self.busy = 0.0

    def run(self, until):
        """Starts every job that starts before `until`."""
        free, arrivals, services, waits = self.free, self.arrivals, self.services, self.waits
        ahead, given = self._ahead(), 0.0
        while self.started < len(arrivals):
            arrival, service = arrivals[self.started], services[self.started]
            start = arrival if arrival > free[0] else free[0]
            if start >= until:
                break
            heapq.heapreplace(free, start + service)
            waits.append(start - arrival)
            given += service
            self.started += 1
        self.paid += len(free) * (until - self.now) + sum(min(end, until) - self.now for end in self.leaving)
        self.now = until
        self.leaving = [end for end in self.leaving if end > until]
        self.busy += ahead + given - self._ahead()

    def _ahead(self):
        """Worker seconds that running jobs still need."""
        return sum(end - self.now for end in self.free + self.leaving if end > self.now)

    def resize(self, workers):
        while len(self.free) < workers:
            heapq.heappush(self.free, self.now)
        while len(self.free) > workers:
            end = heapq.heappop(self.free)
            if end > self.now:
                self.leaving.append(end)

    @property
    def arrived(self):
        return bisect.bisect_right(self.arrivals, self.now)

    @property
    def running(self):
        return sum(end > self.now for end in self.free + self.leaving)

    @property
    def depth(self):
        return self.arrived - self.started

    @property
    def oldest_age(self):
        return self.now - self.arrivals[self.started] if self.depth else 0.0


class Look(typing.NamedTuple):
    """What the scaler knows when it looks."""

    depth: int
    age: float
    utilization: float
    # Instances that serve, and those that serve or start.
    ready: int
    asked: int


# A metric proposes a number of instances, as the HorizontalPodAutoscaler does for its two kinds of target.


def average_value(total, target):
    """So much of it for each instance: type AverageValue."""

    def proposes(look):
        ratio = total(look) / (target * look.asked)
        return look.asked if abs(ratio - 1) <= TOLERANCE else math.ceil(total(look) / target)

    return proposes


def value(metric, target):
    """So many times as many instances as it is above its target: type Value."""

    def proposes(look):
        ratio = metric(look) / target
        return look.asked if abs(ratio - 1) <= TOLERANCE else math.ceil(look.ready * ratio)

    return proposes


def depth_of(service):
    """A depth for each instance that stands for OBJECTIVE, with jobs of this length."""
    return average_value(lambda look: look.depth, OBJECTIVE * WORKERS / service)


def age(most=math.inf):
    """OBJECTIVE itself, and an age that counts as so many times it at most."""
    return value(lambda look: min(look.age, most * OBJECTIVE), OBJECTIVE)


UTILIZATION = value(lambda look: look.utilization, BUSY)

# The largest proposal wins. Both targets say the same of short jobs: OBJECTIVE.
DEPTH_TOO, DEPTH_OF_LONG_TOO = "depth and utilization", "depth, its target for long jobs, and utilization"
AGE_TOO, CLAMPED_TOO = "age and utilization", "age, at most twice its target, and utilization"
POLICIES = {
    "depth": [depth_of(SHORT)],
    "age": [age()],
    "utilization": [UTILIZATION],
    DEPTH_TOO: [depth_of(SHORT), UTILIZATION],
    DEPTH_OF_LONG_TOO: [depth_of(LONG), UTILIZATION],
    AGE_TOO: [age(), UTILIZATION],
    CLAMPED_TOO: [age(CLAMP), UTILIZATION],
}


class Run(typing.NamedTuple):
    fleet: Fleet
    looks: list
    instance_hours: float


def simulate(jobs, metrics, length=DAY, fleet=Fleet):
    """A day of these jobs under a policy, which is the metrics whose largest proposal is taken."""
    fleet = fleet(*jobs, FEWEST * WORKERS)
    ready = asked = FEWEST
    # When each instance that starts will be ready.
    starting = collections.deque()
    starting_paid = 0.0
    # Of the last DOWN_WINDOW: when, and how many.
    proposals = collections.deque()
    # Of each of the last looks: worker seconds in jobs, and all.
    busy = collections.deque(maxlen=RATE_WINDOW)
    looks = []
    for tick in range(1, round(length / SYNC) + 1):
        before = fleet.busy
        fleet.run(tick * SYNC)
        busy.append((fleet.busy - before, ready * WORKERS * SYNC))
        starting_paid += len(starting) * WORKERS * SYNC
        while starting and starting[0] <= fleet.now:
            starting.popleft()
            ready += 1
        fleet.resize(ready * WORKERS)
        # Workers that leave may still be in jobs, hence the limit.
        utilization = min(1.0, sum(part for part, _ in busy) / sum(whole for _, whole in busy))
        look = Look(fleet.depth, fleet.oldest_age, utilization, ready, asked)
        looks.append(look)

        wanted = max(proposes(look) for proposes in metrics)
        proposals.append((fleet.now, wanted))
        while proposals[0][0] <= fleet.now - DOWN_WINDOW:
            proposals.popleft()
        # Not fewer than the most that was proposed in the window.
        wanted = max(wanted, min(asked, max(number for _, number in proposals)))
        wanted = min(wanted, max(UP_FACTOR * asked, asked + UP_PODS))
        wanted = min(max(wanted, FEWEST), MOST)
        while asked < wanted:
            starting.append(fleet.now + START_UP)
            asked += 1
        while asked > wanted:
            # Those that have not started yet go first, the last asked for first of all.
            if starting:
                starting.pop()
            else:
                ready -= 1
            asked -= 1
        fleet.resize(ready * WORKERS)
    return Run(fleet, looks, (fleet.paid + starting_paid) / WORKERS / 3600)


# What is said of a run.


class Figures(typing.NamedTuple):
    """Shares are percent of the jobs that came, of all or in a phase; what still waits counts with its age."""

    late: float
    late_burst: float
    late_longer: float
    late_shorter: float
    worst: float
    hours: float
    most: int
    # In the mean of the phase.
    instances_shorter: float


SPANS = {phase.name: (phase.start, end) for phase, end in with_ends(phases())}


def late(run, start=0.0, end=DAY):
    """Percent of the jobs that came from `start` to `end` which waited longer than OBJECTIVE."""
    arrivals = run.fleet.arrivals
    part = all_waits(run)[bisect.bisect_left(arrivals, start) : bisect.bisect_left(arrivals, end)]
    return 100 * sum(wait > OBJECTIVE for wait in part) / len(part)


def all_waits(run):
    fleet = run.fleet
    return fleet.waits + [fleet.now - arrival for arrival in fleet.arrivals[fleet.started : fleet.arrived]]


def figures(run):
    start, end = SPANS[SHORTER]
    shorter = [look.asked for tick, look in enumerate(run.looks, 1) if start <= tick * SYNC < end]
    phase_shares = (late(run, *SPANS[name]) for name in (BURST, LONGER, SHORTER))
    most = max(look.asked for look in run.looks)
    return Figures(late(run), *phase_shares, max(all_waits(run)), run.instance_hours, most, statistics.mean(shorter))


def whole_day():
    """The figures of each policy, seed by seed."""
    every = {name: [] for name in POLICIES}
    for seed in SEEDS:
        jobs = day(seed)
        for name, metrics in POLICIES.items():
            every[name].append(figures(simulate(jobs, metrics)))
    return every


def day_table(every):
    lines = [
        "| fed by | late, of all | in the burst | jobs 10x longer | jobs 10x shorter"
        " | instances then | longest wait | instance-hours | most |",
        f"|{' --- |' * 9}",
    ]
    for name, seeds in every.items():
        middle = Figures(*map(statistics.median, zip(*seeds)))
        shares = " | ".join(f"{share:.1f} %" for share in middle[:4])
        rest = f"{middle.instances_shorter:.1f} | {middle.worst:.0f} s | {middle.hours:.1f} | {middle.most}"
        lines.append(f"| {name} | {shares} | {rest} |")
    return "\n".join(lines)


# How much work the long jobs bring, against the short ones before them: 2.5 times in the day above.
STEPS = (1.5, 2.5, 4, 8)
STEPPED = ("utilization", DEPTH_TOO, AGE_TOO, CLAMPED_TOO)


def steps():
    """By the size of the step: the share of the long jobs that are late, of each policy, in the median of the seeds."""
    start, end = SPANS[LONGER]
    shares = {name: [] for name in STEPPED}
    for step in STEPS:
        # What comes later is left out.
        days = [day(seed, step * SHORT / LONG, end) for seed in SEEDS]
        for name in STEPPED:
            shares[name].append(statistics.median(late(simulate(jobs, POLICIES[name], end), start, end) for jobs in days))
    return shares


def step_table(shares):
    lines = [f"| fed by | {' | '.join(f'{step:g}x the work' for step in STEPS)} |", f"| --- |{' --- |' * len(STEPS)}"]
    return "\n".join(lines + [f"| {name} | {' | '.join(f'{share:.1f} %' for share in row)} |" for name, row in shares.items()])


def claims(every, shares):
    """What deploy/README.md says of the tables, and whether it is so with every seed."""

    def always(holds, *names):
        return all(holds(*ones) for ones in zip(*(every[name] for name in names)))

    smallest = [row[0] for row in shares.values()]
    last = len(STEPS) - 1
    return {
        "neither depth nor age alone is as good as utilization alone": always(
            lambda depth, age, busy: min(depth.late, age.late) > 3 * busy.late and min(depth.hours, age.hours) > 1.5 * busy.hours,
            "depth", "age", "utilization",
        ),
        "of the two alone, age costs most": always(lambda depth, age: age.hours > 1.3 * depth.hours, "depth", "age"),
        "in the burst depth and age are level": always(
            lambda depth, age: abs(depth.late_burst - age.late_burst) < 2, DEPTH_TOO, AGE_TOO
        ),
        "with longer jobs depth adds little to utilization, and age has a third less late": always(
            lambda busy, depth, age: depth.late_longer > 0.7 * busy.late_longer and age.late_longer < 0.65 * depth.late_longer,
            "utilization", DEPTH_TOO, AGE_TOO,
        ),
        "with shorter jobs depth keeps twice the instances, and none of the two has 1 % late": always(
            lambda depth, age: depth.instances_shorter > 2 * age.instances_shorter
            and max(depth.late_shorter, age.late_shorter) < 1,
            DEPTH_TOO, AGE_TOO,
        ),
        "depth with the target for long jobs has fewest late, and costs a tenth more than age at the least": always(
            lambda depth, age, *others: depth.late < min(one.late for one in (age, *others)) and depth.hours > 1.1 * age.hours,
            DEPTH_OF_LONG_TOO, AGE_TOO, *(name for name in POLICIES if name not in (DEPTH_OF_LONG_TOO, AGE_TOO)),
        ),
        "age goes to the limit where depth does not": always(
            lambda depth, age: age.most == MOST > depth.most, DEPTH_TOO, AGE_TOO
        ),
        "clamped it goes less far, costs less, and has more late with longer jobs": always(
            lambda age, clamped: clamped.most < age.most and clamped.hours < age.hours and clamped.late_longer > age.late_longer,
            AGE_TOO, CLAMPED_TOO,
        ),
        "all are level after a small step": max(smallest) - min(smallest) < 0.5,
        "depth and age are level after the largest": abs(shares[DEPTH_TOO][last] - shares[AGE_TOO][last]) < 0.5,
        "between them age is ahead": all(shares[AGE_TOO][step] < shares[DEPTH_TOO][step] for step in range(1, last)),
        "clamped, age falls behind depth after a large step": shares[CLAMPED_TOO][last] > 1.5 * shares[DEPTH_TOO][last],
    }


def digest(all_figures):
    """What the chart is of, the first seed's day in short. It is written into the chart."""
    text = "; ".join(f"{name}: {' '.join(f'{figure:.1f}' for figure in one)}" for name, one in all_figures.items())
    return "day " + hashlib.sha256(text.encode()).hexdigest()[:16]


def check(tables, held, belongs_to):
    """What does not agree with what is committed."""
    with open(README, encoding="utf-8") as file:
        readme = file.read()
    with open(CHART, encoding="utf-8") as file:
        chart = file.read()
    wrong = [f"this table is not in deploy/README.md:\n{table}" for table in tables if f"\n\n{table}\n\n" not in readme]
    wrong += [f"deploy/README.md says it, and it is not so: {claim}" for claim, holds in held.items() if not holds]
    if belongs_to not in chart:
        wrong.append("scaling.svg was drawn of another day: /usr/bin/python3 deploy/scaling/chart.py deploy/scaling/scaling.svg")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if deploy/README.md or the chart says anything else")
    arguments = parser.parse_args()
    every, shares = whole_day(), steps()
    tables = day_table(every), step_table(shares)
    held = claims(every, shares)
    print(*tables, sep="\n\n", end="\n\n")
    for claim, holds in held.items():
        print("ok    " if holds else "FAILED", claim)
    if not arguments.check:
        return 0
    wrong = check(tables, held, digest({name: seeds[0] for name, seeds in every.items()}))
    print(*wrong, sep="\n")
    print(f"scaling: {len(tables) + len(held) + 1 - len(wrong)} passed, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
