"""Draws the dashboard from the answers that live.py has saved, for those who want to see it before they import it.

    /usr/bin/python3 tests/dashboards/preview.py [--answers FILE] [PICTURE]

It is a preview, not Grafana: panels stand on the dashboard's own grid, with its titles, units, colours and thresholds, but
every line is drawn here. It needs Debian's python3-matplotlib, and fails if a panel has no answer or is of a kind it cannot
draw.
"""

import argparse
import datetime
import json
import math
import os
import re
import typing

import matplotlib

matplotlib.use("Agg")

import matplotlib.colors
import matplotlib.patches
import matplotlib.pyplot
import matplotlib.ticker
import PIL.Image

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Pixels, before the picture is enlarged by SHARPNESS.
WIDTH, COLUMNS = 1240, 24
LINE, GAP, HEAD = 34, 6, 76
SHARPNESS = 1.5
DPI = 100

# The colours of Grafana's dark theme.
GROUND, SURFACE, EDGE, TEXT, FAINT = "#111217", "#181b1f", "#2a2d34", "#d5d8df", "#8e939e"
NAMED = {
    "green": "#73bf69",
    "yellow": "#f2cc0c",
    "orange": "#ff9830",
    "red": "#f2495c",
    "dark-red": "#c4162a",
    "blue": "#5794f2",
    "text": TEXT,
}
PALETTE = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#ca95e5", "#5794f2", "#37a794", "#b877d9", "#e0b400", "#96d98d"]


# Numbers as Grafana writes them.


def short(value, decimals=None):
    """About three digits, without zeros at the end."""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scaled(value, steps, decimals):
    """With the largest unit that leaves at least 1."""
    size, unit = next(((size, unit) for size, unit in steps if abs(value) >= size), steps[-1])
    return f"{short(value / size, decimals)} {unit}"


SECONDS = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")]
RATES = {"ops": "ops/s", "cps": "c/s", "reqps": "req/s"}


def formatted(value, unit, decimals=None):
    if unit == "s":
        return "0 s" if value == 0 else scaled(value, SECONDS, decimals)
    if unit == "percentunit":
        return f"{short(100 * value, decimals)} %"
    if unit == "bytes":
        return scaled(value, [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")], decimals)
    if unit == "Bps":
        return scaled(value, [(1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1, "B/s")], decimals)
    if unit == "dateTimeAsIso":
        return clock(value / 1000, "%Y-%m-%d\n%H:%M:%S")
    if unit in RATES:
        return f"{short(value, decimals)} {RATES[unit]}"
    if unit == "none":
        return short(value, decimals)
    raise SystemExit(f"no way to write the unit {unit}")


def clock(seconds, form):
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime(form)


# What a panel says of its series.


def legend(target, labels):
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), target["legendFormat"]).strip()


def series_of(panel, answers):
    """Each series of a panel: its name, and its samples."""
    named = []
    for target in panel["targets"]:
        for one in answers[target["refId"]]:
            named.append((legend(target, one["labels"]), one["samples"]))
    if not named:
        raise SystemExit(f"no answer for the panel `{panel['title']}`")
    return named


def field(panel, name):
    """The settings of one series: the panel's, and on top what its overrides say."""
    defaults = panel["fieldConfig"]["defaults"]
    settings = {**defaults, **{f"custom.{key}": value for key, value in defaults.get("custom", {}).items()}}
    for override in panel["fieldConfig"]["overrides"]:
        kind, wanted = override["matcher"]["id"], override["matcher"]["options"]
        matches = name == wanted if kind == "byName" else re.search(wanted.strip("/"), name)
        if matches:
            settings.update({one["id"]: one["value"] for one in override["properties"]})
    return settings


def mapped(settings, value):
    """The text and colour that a value is given by name."""
    for mapping in settings.get("mappings", []):
        if mapping["type"] == "value":
            found = mapping["options"].get(f"{value:g}")
            if found:
                return found["text"], found.get("color", "text")
    return None


def colour_of(settings, value):
    steps = settings["thresholds"]["steps"]
    met = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return NAMED[met[-1]]


# Drawing.


class Canvas:
    """A picture measured in pixels from its upper left corner."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.figure = matplotlib.pyplot.figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=GROUND)
        self.renderer = self.figure.canvas.get_renderer()

    def text(self, x, y, text, size, colour=TEXT, room=None, **how):
        """Writes a text, smaller if it does not fit into its room. Returns its width."""
        drawn = self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, color=colour, **how)
        width = drawn.get_window_extent(self.renderer).width
        if room and width > room:
            drawn.set_fontsize(size * room / width)
            width = room
        return width

    def measure(self, text, size):
        drawn = self.figure.text(0, 0, text, fontsize=size)
        width = drawn.get_window_extent(self.renderer).width
        drawn.remove()
        return width

    def box(self, x, y, width, height, colour, edge=None):
        place = (x / self.width, 1 - (y + height) / self.height)
        self.figure.patches.append(
            matplotlib.patches.Rectangle(
                place, width / self.width, height / self.height, facecolor=colour, edgecolor=edge or colour,
                transform=self.figure.transFigure, linewidth=0.8, zorder=-1,
            )
        )

    def axes(self, x, y, width, height):
        place = [x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height]
        axes = self.figure.add_axes(place, facecolor=SURFACE)
        axes.tick_params(colors=FAINT, labelsize=7.5, length=0, pad=3)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes


class Span(typing.NamedTuple):
    """The time that is shown, and the marks in it: when, and in which colour."""

    start: int
    now: int
    marks: list


class Place:
    """The inside of a panel, under its title."""

    def __init__(self, grid):
        unit = WIDTH / COLUMNS
        self.x, self.y = grid["x"] * unit + GAP / 2, HEAD + grid["y"] * LINE + GAP / 2
        self.width, self.height = grid["w"] * unit - GAP, grid["h"] * LINE - GAP
        self.top = self.y + 26
        self.inner = self.y + self.height - self.top


def draw_row(canvas, row):
    place = Place(row["gridPos"])
    folded = row.get("collapsed")
    mark = "\u25b8" if folded else "\u25be"
    text = f"{mark}  {row['title']}{' (folded until it is opened)' if folded else ''}"
    canvas.text(place.x + 4, place.y + place.height / 2, text, 11.5, weight="bold", va="center")


def draw_stat(canvas, place, panel, series, _):
    """One large number for each series, beside each other."""
    room = place.width / len(series)
    for number, (name, samples) in enumerate(series):
        value, settings = samples[-1][1], field(panel, name)
        text, colour = mapped(settings, value) or (formatted(value, settings["unit"], settings.get("decimals")), None)
        middle = place.x + room * (number + 0.5)
        of_many = len(series) > 1 or panel["options"]["textMode"] == "value_and_name"
        colour = NAMED[colour] if colour else colour_of(settings, value)
        lower = 8 if of_many else 0
        size = 14 if "\n" in text else 25 if len(series) < 3 else 20
        canvas.text(middle, place.top + place.inner / 2 - lower - 2, text, size, colour, room - 14, ha="center", va="center")
        if of_many:
            canvas.text(middle, place.y + place.height - 20, name, 8.5, FAINT, room - 8, ha="center", va="center")


def draw_gauge(canvas, place, panel, series, _):
    """An arc for each series, with the thresholds around it."""
    tall = place.inner > place.width * 0.6 and len(series) > 1
    for number, (name, samples) in enumerate(series):
        value, settings = samples[-1][1], field(panel, name)
        low, high = settings["min"], settings["max"]
        share = min(max((value - low) / (high - low), 0), 1)
        if tall:
            height = place.inner / len(series)
            axes = canvas.axes(place.x, place.top + number * height, place.width, height - 4)
        else:
            width = place.width / len(series)
            axes = canvas.axes(place.x + number * width, place.top, width, place.inner - 4)
        axes.set(xlim=(-1.25, 1.25), ylim=(-0.62, 1.12), aspect="equal")
        axes.axis("off")

        def arc(start, end, outer, thick, colour, axes=axes):
            axes.add_patch(matplotlib.patches.Wedge((0, 0), outer, 180 - 180 * end, 180 - 180 * start, width=thick, color=colour))

        steps = settings["thresholds"]["steps"]
        bounds = [low if step["value"] is None else step["value"] for step in steps] + [high]
        for step, start, end in zip(steps, bounds, bounds[1:]):
            arc((start - low) / (high - low), (end - low) / (high - low), 1.08, 0.05, NAMED[step["color"]])
        arc(0, 1, 1, 0.3, EDGE)
        arc(0, share, 1, 0.3, colour_of(settings, value))
        text = formatted(value, settings["unit"], settings.get("decimals"))
        axes.text(0, 0.12, text, color=colour_of(settings, value), fontsize=16, ha="center", va="center")
        axes.text(0, -0.38, name, color=FAINT, fontsize=8.5, ha="center", va="center")


def draw_state_timeline(canvas, place, panel, series, span):
    """A bar for each series, in the colour of what it is in."""
    names = [name for name, _ in series]
    left = max(canvas.measure(name, 8.5) for name in names) + 16
    axes = canvas.axes(place.x + left, place.top, place.width - left - 12, place.inner - 22)
    settings = field(panel, "")
    for row, (_, samples) in enumerate(series):
        for start, end, value in stretches(samples):
            text, colour = mapped(settings, value) or (short(value), "text")
            end = min(end, span.now)
            axes.broken_barh([(start, end - start)], (row - 0.42, 0.84), color=NAMED[colour], alpha=0.85, linewidth=0)
            if (end - start) / (span.now - span.start) * (place.width - left - 12) > canvas.measure(text, 7.5) + 3:
                axes.text(start + 0.4, row, text, fontsize=7.5, color="#101114", va="center", clip_on=True)
    axes.set(ylim=(len(series) - 0.5, -0.5), yticks=range(len(series)))
    axes.set_yticklabels(names, fontsize=8.5, color=TEXT)
    time_axis(axes, span, lines=False)


def stretches(samples):
    """The times during which a value stays the same and is there."""
    begin = samples[0]
    for before, now in zip(samples, samples[1:]):
        if now[1] != begin[1] or now[0] - before[0] > 1.5:
            yield begin[0], before[0] + 1, begin[1]
            begin = now
    yield begin[0], samples[-1][0] + 1, begin[1]


def draw_timeseries(canvas, place, panel, series, span):
    """Lines, with a legend of the last and the highest value below."""
    palette = iter(PALETTE * 3)
    styled = []
    for name, samples in series:
        settings = field(panel, name)
        # A colour of its own does not use one of the palette up less, as in Grafana.
        colour = next(palette)
        if settings["color"]["mode"] == "fixed":
            colour = NAMED[settings["color"]["fixedColor"]]
        styled.append((name, samples, settings, colour))
    settings = field(panel, "")
    unit = settings["unit"]
    rows = legend_rows(canvas, place, styled)
    below = 14 * len(rows) + 24
    highest = max(value for _, samples in series for _, value in samples)
    labels = 50 if unit in ("s", "none", "percentunit") else 66
    axes = canvas.axes(place.x + labels, place.top + 2, place.width - labels - 12, place.inner - below - 4)
    scale = settings["custom.scaleDistribution"]
    if scale["type"] == "symlog":
        axes.set_yscale("symlog", base=scale["log"], linthresh=scale["linearThreshold"])
        axes.set_ylim(0, max(highest, 1) * 2.5)
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        axes.set_ylim(0, highest * 1.12 or 1)
        # Steps that are round in the unit they are written in.
        steps = [1, 1.5, 2, 3, 6, 10] if unit == "s" and highest > 60 else [1, 2, 2.5, 5, 10]
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=steps))
        if unit == "bytes":
            axes.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(2 ** math.ceil(math.log2(highest / 4))))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: formatted(value, unit)))
    for _, samples, own, colour in styled:
        xs, ys = with_gaps(samples)
        dashes = own.get("custom.lineStyle", {}).get("fill") == "dash"
        axes.plot(xs, ys, color=colour, linewidth=1.3, linestyle=(0, (4, 3)) if dashes else "-", zorder=3)
        if own["custom.fillOpacity"]:
            axes.fill_between(xs, ys, color=colour, alpha=own["custom.fillOpacity"] / 100, linewidth=0)
    if settings["custom.thresholdsStyle"]["mode"] != "off":
        for step in settings["thresholds"]["steps"]:
            if step["value"] is not None and step["value"] < axes.get_ylim()[1]:
                axes.axhline(step["value"], color=NAMED[step["color"]], linewidth=0.9, linestyle=(0, (5, 4)), alpha=0.9)
    axes.grid(axis="y", color=EDGE, linewidth=0.6)
    time_axis(axes, span)
    draw_legend(canvas, place, rows)


def with_gaps(samples):
    """A line ends where a sample is missing."""
    xs, ys = [], []
    for when, value in samples:
        if xs and when - xs[-1] > 1.5:
            xs.append(when - 0.5)
            ys.append(math.nan)
        xs.append(when)
        ys.append(value)
    return xs, ys


def legend_rows(canvas, place, styled):
    """The entries of a legend, in as many lines as they need."""
    rows, used = [[]], 0
    for name, samples, settings, colour in styled:
        last, most = samples[-1][1], max(value for _, value in samples)
        unit, decimals = settings["unit"], settings.get("decimals")
        text = f"{name}  {formatted(last, unit, decimals)}"
        if most != last:
            text += f", max {formatted(most, unit, decimals)}"
        width = canvas.measure(text, 7.5) + 30
        if rows[-1] and used + width > place.width - 16:
            rows.append([])
            used = 0
        rows[-1].append((text, colour, used))
        used += width
    return rows


def draw_legend(canvas, place, rows):
    for number, row in enumerate(rows):
        y = place.y + place.height - 14 * (len(rows) - number) + 4
        for text, colour, x in row:
            canvas.box(place.x + 10 + x, y - 1.5, 10, 3, colour)
            canvas.text(place.x + 24 + x, y, text, 7.5, TEXT, place.width - 34, va="center")


def draw_heatmap(canvas, place, panel, series, span):
    """How many in each bucket, which are counts up to a bound and so have to be told apart first."""
    ordered = sorted(((float(name), dict(map(tuple, samples))) for name, samples in series), key=lambda one: one[0])
    times = sorted({when for _, samples in ordered for when in samples})
    below = dict.fromkeys(times, 0.0)
    cells = []
    for _, samples in ordered:
        cells.append([max(samples.get(when, 0) - below[when], 0) for when in times])
        below = {when: samples.get(when, 0) for when in times}
    hidden = panel["options"]["filterValues"]["le"]
    occupied = [row for row, counts in enumerate(cells) if max(counts) > hidden]
    low, high = max(min(occupied) - 1, 0), min(max(occupied) + 2, len(cells))
    cells, bounds = cells[low:high], [bound for bound, _ in ordered][low:high]
    most = max(max(row) for row in cells)
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("oranges", ["#4a2b10", "#d9641c", "#ffb46b", "#fff2e0"])
    shades.set_bad(SURFACE)
    scale = matplotlib.colors.PowerNorm(panel["options"]["color"]["exponent"], 0, most)
    axes = canvas.axes(place.x + 58, place.top + 2, place.width - 130, place.inner - 28)
    shown = [[count if count > hidden else math.nan for count in row] for row in cells]
    mesh = axes.pcolormesh([*times, times[-1] + 1], range(len(cells) + 1), shown, cmap=shades, norm=scale, zorder=2)
    unit = panel["options"]["yAxis"]["unit"]
    every = max(1, round(len(bounds) / 9))
    named = [row for row in range(len(bounds)) if row % every == 0]
    axes.set_yticks([row + 1 for row in named])
    axes.set_yticklabels(["+Inf" if math.isinf(bounds[row]) else formatted(bounds[row], unit) for row in named])
    axes.grid(axis="y", color=EDGE, linewidth=0.5)
    time_axis(axes, span)
    bar_axes = canvas.axes(place.x + place.width - 60, place.top + 2, 10, place.inner - 28)
    bar = canvas.figure.colorbar(mesh, cax=bar_axes)
    bar.outline.set_visible(False)
    bar_axes.tick_params(colors=FAINT, labelsize=7.5, length=0)
    bar.ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))


def time_axis(axes, span, lines=True):
    """The time below a plot. `lines` draws it into the plot too, with the marks of what happened."""
    start, now = span.start, span.now
    axes.set_xlim(start, now)
    axes.set_axisbelow(True)
    # The first and the last would meet what stands beside the plot.
    inside = (now - start) * 0.08
    ticks = [tick for tick in range(start, now) if tick % 20 == 0 and start + inside < tick < now - inside]
    axes.set_xticks(ticks)
    axes.set_xticklabels([clock(tick, "%H:%M:%S") for tick in ticks])
    if lines:
        axes.grid(axis="x", color=EDGE, linewidth=0.6)
        for when, colour in span.marks:
            if start < when < now:
                axes.axvline(when, color=colour, linewidth=0.9, linestyle=(0, (2, 2)), zorder=4)


KINDS = {
    "stat": draw_stat,
    "gauge": draw_gauge,
    "state-timeline": draw_state_timeline,
    "timeseries": draw_timeseries,
    "heatmap": draw_heatmap,
}


def marks(dashboard, answers):
    """When something happened: an annotation's value is a time in milliseconds."""
    for annotation in dashboard["annotations"]["list"]:
        for one in answers["annotations"].get(annotation["name"], []):
            for value in {value for _, value in one["samples"]}:
                yield value / 1000, NAMED[annotation["iconColor"]]


def draw(dashboard, answers):
    everything = [each for panel in dashboard["panels"] for each in [panel, *panel.get("panels", [])]]
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in everything)
    canvas = Canvas(WIDTH, HEAD + lines * LINE + GAP)
    span = Span(answers["start"], answers["now"], list(marks(dashboard, answers)))
    title = canvas.text(12, 22, dashboard["title"], 17, weight="bold", va="center")
    canvas.text(12 + title + 18, 22, "preview, not Grafana", 13, NAMED["orange"], va="center", weight="bold")
    origin = "drawn from what a real Prometheus answered about real servers under load"
    canvas.text(WIDTH - 12, 22, origin, 9.5, FAINT, ha="right", va="center")
    cast = [f"{name}: {part}" for name, part in answers["cast"].items()]
    half = len(cast) // 2
    for number, words in enumerate((cast[:half], cast[half:])):
        canvas.text(12, 46 + 17 * number, "   \u00b7   ".join(words), 8.8, TEXT, WIDTH - 24, va="center")
    for panel in everything:
        if panel["type"] == "row":
            draw_row(canvas, panel)
            continue
        if panel["type"] not in KINDS:
            raise SystemExit(f"no way to draw `{panel['title']}`, a {panel['type']}")
        place = Place(panel["gridPos"])
        canvas.box(place.x, place.y, place.width, place.height, SURFACE, EDGE)
        canvas.text(place.x + 10, place.y + 14, panel["title"], 9.5, room=place.width - 20, va="center", weight="bold")
        KINDS[panel["type"]](canvas, place, panel, series_of(panel, answers["panels"][str(panel["id"])]), span)
    return canvas.figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", default=os.path.join(ROOT, "target/dashboards.json"), help="what live.py has saved")
    parser.add_argument("picture", nargs="?", default=os.path.join(ROOT, "target/preview.png"))
    arguments = parser.parse_args()
    with open(os.path.join(ROOT, "dashboards/millpond.json"), encoding="utf-8") as file:
        dashboard = json.load(file)
    with open(arguments.answers, encoding="utf-8") as file:
        answers = json.load(file)
    draw(dashboard, answers).savefig(arguments.picture, dpi=DPI * SHARPNESS, facecolor=GROUND)
    # 256 colours are enough for lines and text, and a third of the size.
    with PIL.Image.open(arguments.picture) as picture:
        small = picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    small.save(arguments.picture, optimize=True)
    size = os.path.getsize(arguments.picture)
    print(f"drew {arguments.picture}: {small.width} x {small.height}, {size // 1024} KiB")


if __name__ == "__main__":
    main()
