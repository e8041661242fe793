"""What a run found, as text: short, for the end of a terminal's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.cases import BACKENDS, name_of
from benchmarks.gpu.pool import NOT_RUN

# As many names go into a line, as many characters and lines into a list of faults: who reads the end of the output
# shall find the tables there too.
MOST, WIDTH, LINES = 12, 300, 25

Records = Sequence[Mapping[str, Any]]


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text in columns; the first row is the head."""
    rows = [list(map(str, row)) for row in rows]
    if len(rows) < 2:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def status(record: Mapping[str, Any]) -> str:
    return f"{record['status']}: {record['error']}" if record.get("error") else record["status"]


def faults(records: Records) -> list[str]:
    """What is not right, as far as there is room; the JSON has it in full. What was not run is listed with its like."""
    lines = []
    for record in records:
        lines += [f"{record['name']}: lost in {step}: {why}" for step, why in record.get("lost", {}).items()]
        if record["status"] not in ("ok", NOT_RUN):
            lines.append(f"{record['name']}: {status(record)}")
    shown = [line.replace("\n", "; ")[:WIDTH] for line in lines[:LINES]]
    return shown + [f"and {len(lines) - LINES} more: see the JSON"] * (len(lines) > LINES)


def not_run(records: Records) -> list[str]:
    """By reason how many and which, some of them by name: the JSON has all."""
    by_reason: dict[str, list[str]] = {}
    for record in records:
        if record["status"] == NOT_RUN:
            by_reason.setdefault(record["error"], []).append(record["name"])
    lines = []
    for why, names in by_reason.items():
        more = f"; and {len(names) - MOST} more" if len(names) > MOST else ""
        lines.append(f"{why} ({len(names)}): {'; '.join(names[:MOST])}{more}")
    return lines


def kernels(records: Records) -> list[str]:
    """A line for each backend and norm: what became of each launch."""
    lines = []
    for record in records:
        lost = {step: why.partition(":")[0] for step, why in record.get("lost", {}).items()}
        found = {**record.get("kernels", {}), **lost}
        told = ", ".join(f"{name} {what}" for name, what in found.items())
        lines.append(f"{record['name']}: {told or status(record)}")
    return lines


def parity(records: Records) -> list[str]:
    """A row for each backend and dtype, those of other forms apart, a column for each norm: how many are right, of how
    many that were run; and the largest relative error of an output and of the gradient of query, key or value."""

    def kind_of(record: dict[str, Any]) -> tuple[str, str]:
        more = " dropout" if record.get("dropout_p") else " other forms" if record.get("form") else ""
        return record["backend"], record["dtype"] + more

    modes = list(dict.fromkeys(record["mode"] for record in records))
    rows = [["backend", "dtype", *modes, "output off by", "gradients off by"]]
    for kind in sorted(dict.fromkeys(map(kind_of, records)), key=lambda kind: BACKENDS.index(kind[0])):
        of = [record for record in records if kind_of(record) == kind]
        row = list(kind)
        for mode in modes:
            ran = [record for record in of if record["mode"] == mode and record["status"] != NOT_RUN]
            row.append(f"{sum(record['status'] == 'ok' for record in ran)}/{len(ran)}")
        for names in (("output",), ("query gradient", "key gradient", "value gradient")):
            off = [record["errors"][name] for record in of if "errors" in record for name in names]
            row.append(f"{max(off):.1e}" if off else "-")
        rows.append(row)
    return columns(rows)


def comparisons(records: Records) -> list[str]:
    """Milliseconds of every contender; of ours, the eager form and SDPA also those of a replayed graph, and
    microseconds of the host, in a row."""
    done = [record for record in records if record.get("ms") and record["kind"] in ("operator", "model")]
    names = list(dict.fromkeys(name for record in done for name in record["ms"]))
    rows = [["milliseconds", *names, "ours / sdpa or plain ViT", "peak MB, ours / eager"]]
    rows[0] += ["graph ms, ours / eager / sdpa", "host us, ours / eager / sdpa"]
    for record in done:
        ms, peaks = record["ms"], record["peak_bytes"]
        floor = ms.get("sdpa") or ms.get("plain ViT")
        ours = [name for name in BACKENDS if name in ms]
        held = [f"{peaks[name] / 1e6:.0f}" if peaks.get(name) is not None else "-" for name in (*ours, "eager")]
        over = " ".join(f"{ms[name] / floor:.2f}" for name in ours) if floor else "-"
        cells = [f"{ms[name]:.4g}" if name in ms else "-" for name in names]
        beside = [
            " ".join(f"{known[name]:.3g}" if known.get(name) else "-" for name in (*ours, "eager", "sdpa"))
            for known in (record.get("graph_ms", {}), record.get("host_us", {}))
        ]
        rows.append([record["name"], *cells, over or "-", " ".join(held), *beside])
    return columns(rows)


def beside_forecast(records: Records, forecasts: Records) -> list[dict[str, Any]]:
    """The microseconds of every kernel that was timed, all its launches of a training step together, and those that
    were forecast for it."""
    expected = {(f["backend"], f["kernel"], f["shape"], f["norm"]): f for f in forecasts}
    found = []
    for record in records:
        if record["kind"] != "kernel_times" or "ms" not in record:
            continue
        shape = name_of(record["shape"])
        for name, ms in record["ms"].items():
            backend, kernel = name.split(" ", 1)
            each = {"backend": backend, "kernel": kernel, "shape": shape, "norm": record["norm"], "us": 1e3 * ms}
            each |= {"launches": record["launches"][name], "by_host": name in record["by_host"]}
            if forecast := expected.get((backend, kernel, shape, record["norm"])):
                each |= {"forecast_us": 1e6 * forecast["seconds"], "binding": forecast["binding"]}
            found.append(each)
    return found


def forecast_table(rows: Records) -> list[str]:
    """A row for each backend, shape and norm: microseconds of its kernels, over the forecast and what binds there."""
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    lines = [["us of a step's launches (over forecast, bound by) xLAUNCHES", *kernels]]
    for place in dict.fromkeys((row["backend"], row["shape"], row["norm"]) for row in rows):
        cells = dict.fromkeys(kernels, "-")
        for row in rows:
            if (row["backend"], row["shape"], row["norm"]) == place:
                cells[row["kernel"]] = kernel_cell(row)
        lines.append([" ".join(place), *cells.values()])
    return columns(lines)


def kernel_cell(row: Mapping[str, Any]) -> str:
    """Microseconds, the forecast and how many launches, if more than one; and whether the host's time is in it."""
    cell = f"{row['us']:.4g}"
    if "forecast_us" in row:
        cell += f" ({row['us'] / row['forecast_us']:.2f} {row['binding']})"
    if row["launches"] > 1:
        cell += f" x{row['launches']}"
    return cell + " by host" * row["by_host"]


def counters(records: Records) -> list[str]:
    """What the hardware counted, by kernel: the figures of ``benchmarks.gpu.profile.SHOWN``."""
    names = list(dict.fromkeys(name for record in records for name in record.get("shown", {})))
    rows = [["kernel", *names]]
    for record in records:
        if record.get("shown"):
            rows.append([record["name"], *(f"{record['shown'].get(name, float('nan')):.4g}" for name in names)])
    return columns(rows)
