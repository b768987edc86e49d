#!/usr/bin/env python3
"""Draws the panels of manifests/monitoring/dashboard.json from recorded data.

    VIRTNODE_DASHBOARD=$PWD/target/dashboard-data.json \\
        cargo test --locked --test it a_real_prometheus
    scripts/dashboard-picture.py target/dashboard-data.json docs/dashboard.png

The first command records the data: a real daemon, two real guests, some minutes of hotplug, an outage
of libvirt, and the answers of a real Prometheus to the panels' queries. Needs matplotlib (package
python3-matplotlib). Draws every recorded series, and nothing else.
"""

import json
import re
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

UNIT = 0.62  # inches for each of Grafana's rows


def amount(value, unit):
    if unit == "bytes":
        for factor, word in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {word}"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value != 0:
        return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    return f"{value:.4g}"


def series_of(panel, start):
    """Yields name, as in Grafana, and points of each series."""
    for target in panel["targets"]:
        for series in target["result"]:
            labels = series["metric"]
            name = re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), target["legend"])
            points = [(time - start, float(value)) for time, value in series["values"]]
            points = [(time, value) for time, value in points if value == value]  # no NaN
            if points:
                yield name.strip(), points


def draw(axes, panel, start, end):
    axes.set_title(panel["title"], fontsize=9, loc="left", fontweight="bold")
    drawn = sorted(series_of(panel, start))
    if panel["type"] == "stat":
        axes.axis("off")
        for at, (name, points) in enumerate(drawn):
            x = (at + 0.5) / len(drawn)
            text = amount(points[-1][1], panel["unit"])
            axes.text(x, 0.55, text, fontsize=24, ha="center", va="center", color="#1f6f43")
            axes.text(x, 0.15, name, fontsize=8, ha="center", va="center", color="#555555")
        return
    if not drawn:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)
    if panel.get("stack") == "normal" and drawn:
        times = sorted({time for _, points in drawn for time, _ in points})
        rows = [[dict(points).get(time, 0) for time in times] for _, points in drawn]
        axes.stackplot(times, rows, labels=[name for name, _ in drawn], alpha=0.8)
    else:
        for name, points in drawn:
            times, values = [points[0][0]], [points[0][1]]
            for time, value in points[1:]:
                if time - times[-1] > 1.5:  # do not draw a line across a gap
                    times.append((time + times[-1]) / 2)
                    values.append(float("nan"))
                times.append(time)
                values.append(value)
            alone = len(points) == 1
            axes.plot(times, values, label=name, linewidth=1.2, marker="." if alone else None)
    axes.set_xlim(0, end - start)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value, panel["unit"])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if drawn:
        shown = axes.get_legend_handles_labels()
        most = 12
        more = len(shown[0]) - most
        axes.legend(
            shown[0][:most], shown[1][:most], fontsize=5.5, ncol=2, loc="best", framealpha=0.6,
            title=f"and {more} more" if more > 0 else None, title_fontsize=5.5,
        )


def main(source, picture):
    with open(source, encoding="utf-8") as file:
        data = json.load(file)
    width = 24
    bottom = max(panel["at"]["y"] + panel["at"]["h"] for panel in data["panels"])
    figure = pyplot.figure(figsize=(17, bottom * UNIT * 0.62), dpi=80)
    for panel in data["panels"]:
        at = panel["at"]
        left, top = at["x"] / width, 1 - at["y"] / bottom
        if panel["type"] == "row":
            figure.text(0.012, top - 0.5 * at["h"] / bottom, panel["title"], fontsize=12, va="center")
            continue
        box = [
            left + 0.034, top - (at["h"] - 0.9) / bottom,
            at["w"] / width - 0.044, (at["h"] - 2.1) / bottom,
        ]
        draw(figure.add_axes(box), panel, data["from"], data["to"])
    figure.savefig(picture)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
