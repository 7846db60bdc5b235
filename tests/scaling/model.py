"""The queue and the scaler of deploy/scaling/simulate.py, held to what theory and Kubernetes' documentation say.

    /usr/bin/python3 tests/scaling/model.py

Each bug in FAULTS is planted after that, and has to be found by one of the same checks. It is seeded, and takes some seconds.
"""

import heapq
import os
import random
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [os.path.join(ROOT, "tests/common"), os.path.join(ROOT, "deploy/scaling")]

import simulate  # noqa: E402  (the path comes first)
from erlang import erlang_c, mean_wait, table  # noqa: E402
from programs import Report  # noqa: E402
from simulate import README, SYNC, WORKERS, Fleet, Look  # noqa: E402

# A part of the day with everything in it: the burst, scaling out and in, and at its end long jobs that wait.
PART = 4275.0


def poisson(seed, jobs, rate, service):
    chance = random.Random(seed)
    now, arrivals = 0.0, []
    for _ in range(jobs):
        now += chance.expovariate(rate)
        arrivals.append(now)
    return arrivals, [chance.expovariate(1 / service) for _ in arrivals]


def steady(fleet):
    """M/M/4 at 80 %: Erlang's mean wait, his share of jobs that wait, Little's law, and utilization."""
    jobs, rate, service, workers = 200_000, 8.0, 0.4, 4
    queue = fleet(*poisson(11, jobs, rate, service), workers)
    end, depths = int(queue.arrivals[-1]), []
    for second in range(1, end):
        queue.run(second)
        depths.append(queue.depth)
    share, theory = erlang_c(workers, rate * service), mean_wait(workers, rate * service) * service
    mean = sum(queue.waits) / len(queue.waits)
    waited = sum(wait > 0 for wait in queue.waits) / len(queue.waits)
    depth, little = sum(depths) / len(depths), len(queue.waits) / end * mean
    used = queue.busy / queue.paid
    yield "the mean wait is Erlang's", abs(mean / theory - 1) < 0.05, f"{mean:.3f} s, of {theory:.3f}"
    yield "so is the share that waits", abs(waited / share - 1) < 0.03, f"{waited:.3f}, of {share:.3f}"
    yield "Little's law holds", abs(depth / little - 1) < 0.02, f"depth {depth:.2f}, rate times wait {little:.2f}"
    yield "utilization is the load of a worker", abs(used / (rate * service / workers) - 1) < 0.02, f"{used:.3f}"


def accounts(fleet):
    """A day under a scaler, worked out anew from each job's wait alone."""
    arrivals, services = jobs = simulate.day(3, until=PART)
    run = simulate.simulate(jobs, simulate.POLICIES[simulate.DEPTH_TOO], PART, fleet)
    queue, now = run.fleet, run.fleet.now
    spans = [(arrival + wait, arrival + wait + service) for arrival, wait, service in zip(arrivals, queue.waits, services)]
    came = sum(arrival <= now for arrival in arrivals)
    ended = sum(end <= now for _, end in spans)
    running = sum(start < now < end for start, end in spans)
    waiting = came - len(spans)
    figure = f"{came} came, {ended} ended, {queue.running} run, {queue.depth} wait"
    yield "who came has ended, runs or waits", came == ended + queue.running + queue.depth and queue.depth > 0, figure
    yield "those that run and wait are so many", (running, waiting) == (queue.running, queue.depth), f"{running}, {waiting}"
    starts = [start for start, _ in spans]
    yield "first come, first served", starts == sorted(starts) and min(queue.waits) >= 0, f"{len(starts)} jobs"
    busy = sum(min(end, now) - start for start, end in spans)
    yield "time in jobs is theirs", abs(busy - queue.busy) < 1e-6 * busy, f"{queue.busy:.0f} s"
    yield "time paid for is no less", queue.paid >= queue.busy, f"{queue.paid:.0f} s"
    most = too_many = number = 0
    for when, change in sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans]):
        number += change
        most = max(most, number)
        too_many += number > workers_around(run, when)
    yield "no more run than there are workers", too_many == 0, f"{most} at most"


def workers_around(run, when):
    """The most workers from a minute before, since those that left may still be in jobs, until the next look."""
    tick = int(when / SYNC)
    return WORKERS * max(look.ready for look in run.looks[max(0, tick - 4) : tick + 2])


def resized(fleet):
    """By hand: four jobs of 10 s on two workers, of which one leaves at 5 s and one comes at 12 s."""
    queue = fleet([0.0, 0.0, 1.0, 2.0], [10.0, 10.0, 10.0, 10.0], 2)
    queue.run(5.0)
    yield "the oldest waits since it came", (queue.depth, queue.oldest_age, queue.running) == (2, 4.0, 2), queue.oldest_age
    queue.resize(1)
    queue.run(12.0)
    queue.resize(2)
    queue.run(40.0)
    yield "who leaves ends its job, who comes takes the next", queue.waits == [0.0, 0.0, 9.0, 10.0], queue.waits
    # Two workers for 10 s, one for 2, and two for 28; the jobs take 40 s of it.
    yield "and both are paid for", (queue.paid, queue.busy) == (78.0, 40.0), (queue.paid, queue.busy)


def repeats(fleet):
    """The same seed gives the same day, and another seed another."""
    runs = [simulate.simulate(simulate.day(seed, until=1200), simulate.POLICIES["age"], 1200, fleet) for seed in (5, 5, 6)]
    first, again, other = ((run.looks, run.fleet.waits) for run in runs)
    yield "a seed gives the same day again", first == again and first[1] != other[1], f"{len(first[0])} looks"


def look(**known):
    return Look(**{"depth": 0, "age": 0.0, "utilization": 0.0, "ready": 4, "asked": 4} | known)


def proposals():
    """What the HorizontalPodAutoscaler would propose, worked out by hand."""
    # 16 an instance; 2 s; and 2 s, of which 4 s count at most.
    depth, age, clamped = simulate.depth_of(0.5), simulate.age(), simulate.age(2)
    for what, proposed, right in [
        ("160 jobs, 16 each", depth(look(depth=160)), 10),
        ("161 jobs", depth(look(depth=161)), 11),
        ("a tenth more than the target of four", depth(look(depth=70)), 4),
        ("and one more", depth(look(depth=71)), 5),
        ("a hundred, while some start", depth(look(depth=100, asked=6)), 6),
        ("no job", depth(look()), 0),
        ("2.5 times the age", age(look(age=5.0)), 10),
        ("the same, while some start", age(look(age=5.0, asked=8)), 10),
        ("less than 1.1 times the age", age(look(age=2.19)), 4),
        ("ten times the age, clamped", clamped(look(age=20.0)), 8),
        ("0.35 of 0.7", simulate.UTILIZATION(look(utilization=0.35)), 2),
        ("1 of 0.7", simulate.UTILIZATION(look(utilization=1.0)), 6),
    ]:
        yield f"proposed for {what}", proposed == right, proposed


def behaviour():
    """Wants 40 for a minute, and then 3: at most doubled or four more in 15 s, ready after 45 s, fewer after five minutes."""
    wishes = iter([40] * 4 + [3] * 100)
    looks = simulate.simulate(([], []), [lambda _: next(wishes)], 900).looks
    asked, ready = [one.asked for one in looks], [one.ready for one in looks]
    # A look tells what the look before it asked for.
    yield "it grows by the larger of twice and four", asked[:5] == [2, 6, 12, 24, 40], asked[:5]
    # Asked for at the first look, there at the fourth.
    yield "what was asked for is ready after its start", ready[:7] == [2, 2, 2, 6, 12, 24, 40], ready[:7]
    # The last wish for 40 was at the 4th look, and the 24th is 300 s later.
    yield "it shrinks when the window holds no larger wish", asked[23] == 40 and asked[24] == 3 == ready[24], asked[22:26]


def erlang():
    """The formula, against what is known of one worker, and against the sums it is defined by."""
    yield "of one worker the share that waits is how busy it is", abs(erlang_c(1, 0.7) - 0.7) < 1e-12, erlang_c(1, 0.7)
    # By the sums of the definition: 4 workers, 3.2 busy.
    before = sum(3.2**number / factorial for number, factorial in enumerate([1, 1, 2, 6]))
    last = 3.2**4 / 24 / (1 - 0.8)
    yield "of four it is what the sums say", abs(erlang_c(4, 3.2) - last / (before + last)) < 1e-12, round(erlang_c(4, 3.2), 4)
    with open(README, encoding="utf-8") as file:
        yield "deploy/README.md has the table", f"\n\n{table()}\n\n" in file.read(), "as erlang.py prints it"


# Bugs, each of which a check above has to find.


class ForgetsJobs(Fleet):
    """A job that waits is taken now and then, and never run."""

    def run(self, until):
        if self.started % 100 > 90 and self.depth:
            self.started += 1
        super().run(until)


class NewestFirst(Fleet):
    """What has come last is taken first."""

    def run(self, until):
        super().run(until)
        self.waits[-5:] = self.waits[-5:][::-1]


class TwoAtOnce(Fleet):
    """A worker takes the next job before it has ended the last."""

    def resize(self, workers):
        super().resize(workers)
        if self.free and self.free[0] <= self.now:
            heapq.heappush(self.free, self.now)


class CutsJobs(Fleet):
    """Who leaves drops the job it has."""

    def resize(self, workers):
        super().resize(workers)
        self.leaving = []


class LooksOnlyAtEnds(Fleet):
    """Time in jobs counts when a job ends and not while it runs."""

    def _ahead(self):
        return 0.0


class AgeOfTheNewest(Fleet):
    """The age is that of the job that came last."""

    @property
    def oldest_age(self):
        return self.now - self.arrivals[self.arrived - 1] if self.depth else 0.0


CHECKS = [steady, accounts, resized, repeats]
FAULTS = [ForgetsJobs, NewestFirst, TwoAtOnce, CutsJobs, LooksOnlyAtEnds, AgeOfTheNewest]


def finding(fault):
    """What finds it; the check that takes long comes last."""
    for check in sorted(CHECKS, key=lambda check: check is steady):
        for what, holds, _ in check(fault):
            if not holds:
                return what
    return None


def main():
    report = Report()
    for check in CHECKS:
        for claim in check(Fleet):
            report.claim(*claim)
    for check in (proposals, behaviour, erlang):
        for claim in check():
            report.claim(*claim)
    for fault in FAULTS:
        found = finding(fault)
        report.claim(f"found: {fault.__doc__.rstrip('.')}", found is not None, found)
    print(f"model: {report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
