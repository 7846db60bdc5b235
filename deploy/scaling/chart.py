"""Draws the first day of simulate.py: work offered, waits, and the instances that each policy asks for.

    /usr/bin/python3 deploy/scaling/chart.py deploy/scaling/scaling.svg

It needs Debian's python3-matplotlib. A PNG is drawn as well, if the name ends so.
"""

import bisect
import sys

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "millpond", "font.size": 9, "font.family": "sans-serif"}

from matplotlib import pyplot, ticker  # noqa: E402  (what is drawn with comes first)

import simulate  # noqa: E402
from simulate import AGE_TOO, CLAMPED_TOO, DAY, DEPTH_TOO, MOST, OBJECTIVE, RATE, SPANS, SYNC  # noqa: E402

BLUE, ORANGE, GREEN, INK, MUTED, GRID = "#2f6db5", "#e0822d", "#3a9455", "#222222", "#666666", "#dddddd"
COLUMNS = [
    ("Depth alone, age alone", [("depth", ORANGE, "depth"), ("age", BLUE, "age")]),
    (
        "Each beside utilization",
        [(DEPTH_TOO, ORANGE, "depth"), (AGE_TOO, BLUE, "age"), (CLAMPED_TOO, GREEN, "age, at most twice its target")],
    ),
]
MINUTES = range(round(DAY / 60))


def offered(minute):
    """How many workers what comes would keep busy."""
    phase = [phase for phase in simulate.phases() if phase.start <= 60 * minute][-1]
    return RATE * phase.rate * phase.service * simulate.swing(60 * minute)


def longest_waits(run):
    """Of the jobs that came in each minute."""
    waits, arrivals = simulate.all_waits(run), run.fleet.arrivals
    edges = [bisect.bisect_left(arrivals, 60 * minute) for minute in [*MINUTES, len(MINUTES)]]
    return [max(waits[start:end], default=0) for start, end in zip(edges, edges[1:])]


def draw(runs, path, of):
    figure, axes = pyplot.subplots(3, 2, sharex=True, sharey="row", figsize=(11, 7), height_ratios=[0.7, 1.2, 1.2])
    for (title, lines), (work, waits, instances) in zip(COLUMNS, axes.T):
        work.set_title(title, loc="left", fontsize=11, color=INK, pad=16)
        work.fill_between(MINUTES, [offered(minute) for minute in MINUTES], color=GRID, linewidth=0, step="post")
        for name, colour, label in lines:
            waits.plot(MINUTES, longest_waits(runs[name]), color=colour, linewidth=1.2, label=label)
            asked = [look.asked for look in runs[name].looks]
            instances.plot([tick * SYNC / 60 for tick in range(1, len(asked) + 1)], asked, color=colour, linewidth=1.2)
        waits.axhline(OBJECTIVE, color=MUTED, linewidth=0.9, linestyle=(0, (5, 4)))
        waits.legend(loc="upper right", frameon=False, fontsize=8.5)
        instances.set_xlabel("minutes", color=MUTED)
        for name, (start, end) in SPANS.items():
            if name:
                work.text((start + end) / 120, 33, name, color=MUTED, fontsize=8, ha="center", va="bottom")
        for axis in (work, waits, instances):
            style(axis)
    axes[0, 0].set(ylabel="work offered, in workers", ylim=(0, 32))
    axes[1, 0].set_yscale("symlog", linthresh=1)
    axes[1, 0].set(ylabel="longest wait, s", ylim=(0, 150), yticks=[0, 0.5, 1, 2, 5, 10, 30, 100])
    axes[1, 0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda number, _: f"{number:g}"))
    axes[1, 0].yaxis.set_minor_locator(ticker.NullLocator())
    axes[2, 0].set(ylabel="instances asked for", ylim=(0, MOST * 1.05))
    figure.align_ylabels()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Date": None, "Description": of} if path.endswith(".svg") else None)


def style(axis):
    for name, (start, end) in SPANS.items():
        if name:
            axis.axvspan(start / 60, end / 60, color=GRID, alpha=0.4, linewidth=0)
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, length=3)
    axis.yaxis.label.set_color(MUTED)
    axis.margins(x=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def main():
    jobs = simulate.day(simulate.SEEDS[0])
    runs = {name: simulate.simulate(jobs, metrics) for name, metrics in simulate.POLICIES.items()}
    draw(runs, sys.argv[1], simulate.digest({name: simulate.figures(run) for name, run in runs.items()}))


if __name__ == "__main__":
    main()
