"""The report says what the result files say: ratios, fits, faults; a change is one beyond noise; files are refused."""

import json
import math
import sys

import numpy
import pytest

from benchmarks import report

OURS = ("triton", "cuda", "cpu", "reference")
CPU = {
    "reattn": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "cuda": "none: torch is built without it",
    "commit": "537b7c3280481f1068378765f14bfedceb008249",
    "modified": False,
    "threads": 2,
    "date": "2026-11-25T17:56:07+00:00",
    "device": "Some CPU",
    "instruction_set": "avx2",
    "team": "torch's OpenMP threads",
    "ceilings": {"flops_per_s": {"float32": 1e11, "bfloat16": 2e11}, "bytes_per_s": 1e10},
}
GPU = {
    **{name: value for name, value in CPU.items() if name not in ("instruction_set", "team")},
    "device": "Some GPU",
    "cuda": "13.0",
    "modified": True,
    "compute_capability": "9.0",
    "multiprocessors": 132,
    "memory_bytes": 80e9,
    "l2_bytes": 50e6,
    "driver": "580.1",
}


def comparison(kind, times, direction="forward", faults=None, memory=None, rounds=25, iqr=0.01, **problem):
    """Benchmarks of one problem as pytest-benchmark writes them, from milliseconds and bytes by contender."""
    if kind == "model":
        problem = {"model": "deepvit_16b", "batch": 8, "dtype": "float32", **problem}
    else:
        problem = {
            **{"batch": 8, "heads": 12, "seqlen": 197, "head_dim": 64, "norm": "batch", "dtype": "float32"},
            **problem,
        }
    memory = {name: (memory or {}).get(name) for name in times}
    peers = {name: ms for name, ms in times.items() if name not in (*OURS, "cpu unmasked", "sdpa", "plain ViT")}
    best = min(peers, key=peers.get, default=None)
    benchmarks = []
    for name, ms in times.items():
        facts = {
            **{"kind": kind, "contender": name, "ours": name in OURS, "direction": direction, **problem},
            **{"ms": ms, "all_ms": times, "faults": faults or {}, "peak_bytes": memory[name], "all_peak_bytes": memory},
        }
        if kind == "model":
            facts["images_per_s"] = 1e3 * problem["batch"] / ms
            facts["ratio_to_plain_vit"] = ms / times["plain ViT"] if "plain ViT" in times else None
        else:
            facts |= {
                **{"flops": 4e9, "traffic_bytes": 1e8, "tflops": 4e9 / ms / 1e9, "share_of_roofline": 40 / ms},
                **{"bound": "compute", "ratio_to_sdpa": ms / times["sdpa"] if "sdpa" in times else None},
                "ratio_to_unmasked": ms / times[f"{name} unmasked"] if f"{name} unmasked" in times else None,
                **{"best_peer": best, "ratio_to_best_peer": ms / peers[best] if best else None},
            }
        stats = {"median": 1e-3 * ms, "iqr": 1e-3 * ms * iqr, "rounds": rounds}
        benchmarks.append({"name": name, "group": "", "stats": stats, "extra_info": facts})
    return benchmarks


def write(path, *comparisons, machine=CPU):
    benchmarks = [benchmark for each in comparisons for benchmark in each]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine_info": {"reattn": machine}, "benchmarks": benchmarks}))
    return path


def scaling(lengths=(128, 256, 512, 1024)):
    """Ours has linear memory and quadratic time but at the shorter sizes; eager is quadratic and runs out of memory."""
    for length in lengths:
        times, memory = {"cpu": length**2 / 1e4 + 50 * (length < 512)}, {"cpu": 1e4 * length}
        faults = {"eager": "out of memory"}
        if length < 1024:
            times["eager"], memory["eager"], faults = length**2.5 / 1e3, 100 * length**2, {}
        yield comparison("scaling", times, memory=memory, faults=faults, seqlen=length)


def everything():
    """Of all kinds: two backends, one that fails, a peer that is wrong."""
    return [
        comparison("operator", {"triton": 50, "cuda": 80, "eager": 125, "compiled": 100, "sdpa": 40}),
        comparison("operator", {"triton": 100, "eager": 125}, "forward+backward", {"cuda": "failed: E: x"}),
        comparison("operator", {"triton": 5, "sdpa": 4}, dtype="bfloat16", faults={"eager": "wrong: far off"}),
        comparison("module", {"triton": 50, "vit-pytorch": 75, "sdpa": 25}, memory={"triton": 119e6}),
        comparison("model", {"triton": 400, "cuda": 500, "reference": 1000, "plain ViT": 320}, "inference"),
        *scaling(),
    ]


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.fixture
def printed(tmp_path, capsys):
    """What the files that hold the given comparisons are rendered as."""

    def render(*comparisons, machine=CPU):
        assert report.main([str(write(tmp_path / "result.json", *comparisons, machine=machine))]) == 0
        return capsys.readouterr().out

    return render


def test_every_file_says_where_it_comes_from(printed):
    cpu, gpu = (printed(*everything(), machine=machine) for machine in (CPU, GPU))
    assert (
        "`result.json`: Some CPU, 2 threads (torch's OpenMP threads), avx2; reattn 0.1.0, python 3.11.7, torch 2.13.0; "
        "commit 537b7c3280, unmodified; 2026-11-25T17:56:07+00:00; "
        "matrix product float32 100 GFLOP/s, bfloat16 200 GFLOP/s, copy 10 GB/s\n"
    ) in cpu
    assert "Some GPU, compute capability 9.0, 132 multiprocessors, 80 GB, L2 50 MB, driver 580.1; " in gpu
    assert "triton 3.7.1, cuda 13.0; commit 537b7c3280, with changes; " in gpu


def test_the_operator_has_a_row_for_each_of_our_backends(printed):
    times = {"triton": 50, "cuda": 80, "eager": 125, "compiled": 100, "sdpa": 40}
    text = printed(comparison("operator", times, memory={"triton": 119e6, "eager": 1.7e9}))
    assert "### Operator, float32, forward\n" in text
    columns, _, triton, cuda = rows(text)
    shape = ["8x12x197x64", "batch"]
    assert columns == [
        *("shape", "norm", "backend", "ms", "over SDPA", "best peer"),
        *("speed-up", "speed-up over eager", "speed-up over compiled", "FLOP/s", "roofline", "peak memory", "eager's"),
    ]
    compute = ["80% (compute)", "50% (compute)"]
    assert triton == [
        *(*shape, "triton", "50", "1.25", "compiled", "2", "2.5", "2"),
        *("80 GFLOP/s", compute[0], "119 MB", "1.7 GB"),
    ]
    assert cuda == [
        *(*shape, "cuda", "80", "2", "compiled", "1.25", "1.56", "1.25"),
        *("50 GFLOP/s", compute[1], "-", "1.7 GB"),
    ]


def test_times_without_the_host(printed):
    benchmarks = comparison("operator", {"triton": 0.5, "eager": 0.25, "compiled": 0.125})
    for benchmark, graph_ms in zip(benchmarks, (0.0625, 0.2, None), strict=True):
        benchmark["extra_info"] |= {"graph_ms": graph_ms, "host_us": 400.0}
    text = printed(benchmarks, comparison("operator", {"triton": 50}, "forward+backward"))
    assert rows(text.partition("### Without the host\n")[2]) == [
        ["operator", "direction", "triton", "eager", "compiled"],
        ["---"] * 5,
        ["8x12x197x64 batch float32", "forward", "0.5 / 0.0625 / 400", "0.25 / 0.2 / 400", "0.125 / - / 400"],
    ]


def test_kernels_stand_beside_their_forecasts(tmp_path, capsys):
    place = {"backend": "cuda", "shape": "128x12x197x64", "norm": "layer"}
    kernels = [
        {**place, "kernel": "forward", "us": 180.0, "launches": 1, "by_host": False},
        {**place, "kernel": "backward", "us": 400.0, "launches": 7, "by_host": False},
        {**place, "kernel": "unfold", "us": 9.0, "launches": 1, "by_host": True},
        {**place, "norm": "none", "kernel": "forward", "us": 9.0},
    ]
    kernels[1] |= {"forecast_us": 500.0, "binding": "L2"}
    path = write(tmp_path / "check.json", comparison("operator", {"cuda": 50}), machine=GPU)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gpu": {"kernels": kernels}}))
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert rows(text.partition("### Kernels, measured beside forecast\n")[2]) == [
        ["cuda", "norm", "forward", "backward", "unfold"],
        ["---"] * 5,
        ["128x12x197x64", "layer", "180", "400 (0.80 L2) x7", "9 by host"],
    ]


def test_masks_are_held_to_no_mask_and_to_plain_attention(printed):
    times = {"cpu": 60, "cpu unmasked": 50, "eager": 150, "sdpa": 40}
    text = printed(
        comparison("masks", times, memory={"cpu": 8e6, "eager": 100e6}, mask="padding"),
        comparison("masks", times | {"cpu": 30}, "forward+backward", mask="causal", norm="layer"),
    )
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### Masks, float32, forward",
        "### Masks, float32, forward+backward",
    ]
    columns, _, padding, _, _, causal = rows(text)
    assert columns == [
        *("shape", "norm", "mask", "backend", "ms", "over SDPA", "over no mask", "speed-up"),
        *("peak memory", "eager's"),
    ]
    assert padding == ["8x12x197x64", "batch", "padding", "cpu", "60", "1.5", "1.2", "2.5", "8 MB", "100 MB"]
    assert causal == ["8x12x197x64", "layer", "causal", "cpu", "30", "0.75", "0.6", "5"]


def test_a_module_on_the_reference_says_so(printed):
    times = {"reference": 50, "eager": 75, "compiled": 60, "sdpa": 25}
    _, _, row = rows(printed(comparison("module", times, norm="talking-heads")))
    assert row[:7] == ["8x12x197x64", "talking-heads", "reference", "50", "2", "compiled", "1.2"]


def test_columns_without_a_value_are_left_out(printed):
    columns, _, row = rows(printed(comparison("operator", {"cpu": 50})))
    assert columns == ["shape", "norm", "backend", "ms", "FLOP/s", "roofline"]
    assert len(row) == len(columns)


def test_tables_are_apart_by_kind_dtype_and_direction(printed):
    headings = [line for line in printed(*everything()).splitlines() if line.startswith("#")]
    assert headings == [
        "## Some CPU, avx2",
        "### Operator, float32, forward",
        "### Operator, float32, forward+backward",
        "### Operator, bfloat16, forward",
        "### Module, float32, forward",
        "### Model",
        "### Scaling, forward, batch 8, 12 heads, head dim 64, norm batch, float32",
        "### Without a time",
    ]


def test_models_are_held_to_the_plain_vit_and_the_fastest_of_ours(printed):
    times = {"triton": 400, "cuda": 500, "reference": 1000, "plain ViT": 320}
    _, _, *models = rows(printed(comparison("model", times, "inference")))
    what = ["deepvit_16b, batch 8, float32", "inference"]
    assert models == [
        [*what, "triton", "20", "0.8", "1"],
        [*what, "cuda", "16", "0.64", "1.25"],
        [*what, "reference", "8", "0.32", "2.5"],
        [*what, "plain ViT", "25", "1", "0.8"],
    ]


def test_scaling_has_fits_and_what_ran_out_of_memory(printed):
    text = printed(*scaling())
    columns, _, *times = rows(text.partition("Peak memory")[0])
    assert columns == ["N", "cpu", "eager"]
    assert times == [
        ["128", "51.6", "185"],
        ["256", "56.6", "1050"],
        ["512", "26.2", "5930"],
        ["1024", "105", "out of memory"],
        ["fit", "N^2.00", "N^2.50"],
    ]
    assert rows(text.partition("Peak memory")[2])[-2:] == [
        ["1024", "10.2 MB", "out of memory"],
        ["fit", "N^1.00", "N^2.00"],
    ]
    # It stands in the table.
    assert "Without a time" not in text


def test_fits():
    assert report.exponent({100: 3.0}) is None
    assert report.exponent({100: 3.0, 200: 12.0}) == pytest.approx(2)
    # Three of five.
    assert report.exponent({1: 9.0, 2: 1.0, 4: 16.0, 8: 64.0, 16: 256.0}) == pytest.approx(2)
    # No peak that could be seen has no logarithm.
    assert report.exponent({1: 0, 2: 2.0, 4: 4.0}) == pytest.approx(1)


def test_faults_are_told_once_with_their_places(printed):
    text = printed(
        comparison("operator", {"cpu": 50, "sdpa": 40}, faults={"compiled": "out of memory", "eager": "wrong: by | 3"}),
        comparison("operator", {"cpu": 50}, "forward+backward", {"compiled": "out of memory"}),
        comparison("scaling", {"cpu": 50}, faults={"eager": "failed: E: x"}),
    )
    assert text.partition("### Without a time\n\n")[2].splitlines() == [
        "- compiled: out of memory (operator 8x12x197x64 batch float32 forward; "
        "operator 8x12x197x64 batch float32 forward+backward)",
        "- eager: wrong: by | 3 (operator 8x12x197x64 batch float32 forward)",
        "- eager: failed: E: x (scaling 8x12x197x64 batch float32 forward)",
    ]
    # The kind of fault in place of its memory or time.
    assert rows(text)[2][-1] == "wrong"
    assert ["197", "50", "failed"] in rows(text)


def test_numbers_have_three_digits_and_no_exponent():
    assert [report.significant(value) for value in (0.012345, 1.0, 999.7, 12345)] == ["0.0123", "1", "1000", "12300"]
    assert [report.scaled(value, "B") for value in (0, 999, 1500, 1.19e8, 8e10)] == [
        *("0 B", "999 B", "1.5 kB", "119 MB", "80 GB")
    ]


def test_the_error_of_a_median_is_that_of_drawn_ones():
    draws = numpy.random.default_rng(0).normal(10, 0.5, (4000, 51))
    low, high = numpy.quantile(draws, (0.25, 0.75), axis=1)
    errors = [report.relative_error(10, iqr, 51) for iqr in high - low]
    assert numpy.mean(errors) == pytest.approx(numpy.median(draws, axis=1).std() / 10, rel=0.05)
    # Over a median twice as large, and four times as many rounds.
    assert report.relative_error(20, 1, 40) == pytest.approx(report.relative_error(10, 1, 10) / 4)


@pytest.fixture
def compare(tmp_path, capsys):
    """The exit status, the rows and the text of a comparison of two lists of benchmarks."""

    def run(old, new):
        paths = [str(write(tmp_path / name, each)) for name, each in (("old.json", old), ("new.json", new))]
        status = report.main(["--compare", *paths])
        text = capsys.readouterr().out
        return status, rows(text)[2:], text

    return run


def test_a_backend_that_got_slower_fails(compare):
    old, new = (comparison("operator", {"cpu": ms, "sdpa": 40}) for ms in (50, 60))
    error = report.relative_error(1, 0.01, 25) * math.sqrt(4)
    status, changes, text = compare(old, new)
    assert changes == [
        [
            *("operator 8x12x197x64 batch float32 forward", "cpu", "1.25 x sdpa", "1.5 x sdpa"),
            *("+20.0% slower", f"{error:.1%}"),
        ]
    ]
    assert status == 1 and "1 of 1 changed beyond noise." in text
    status, changes, _ = compare(new, old)
    assert [row[4] for row in changes] == ["-16.7% faster"] and status == 0


def test_a_peer_that_got_slower_does_not_fail(compare):
    old, new = (comparison("operator", {"cpu": 50, "eager": ms, "sdpa": 40}) for ms in (50, 60))
    status, changes, _ = compare(old, new)
    assert [row[1] for row in changes] == ["eager"] and status == 0


@pytest.mark.parametrize(
    ("kind", "direction", "yardstick"), [("operator", "forward", "sdpa"), ("model", "training", "plain ViT")]
)
def test_what_slows_the_yardstick_as_well_is_no_change(compare, kind, direction, yardstick):
    old = comparison(kind, {"cpu": 50, yardstick: 40}, direction)
    assert compare(old, comparison(kind, {"cpu": 75, yardstick: 60}, direction))[:2] == (0, [])
    status, changes, _ = compare(old, comparison(kind, {"cpu": 50, yardstick: 32}, direction))
    assert status == 1 and changes[0][2:4] == [f"1.25 x {yardstick}", f"1.56 x {yardstick}"]


def test_times_are_compared_where_a_run_has_no_yardstick(compare):
    old, new = comparison("operator", {"cpu": 50, "sdpa": 40}), comparison("operator", {"cpu": 60})
    status, changes, text = compare(old, new)
    error = report.relative_error(1, 0.01, 25) * math.sqrt(2)
    assert changes[0][2:] == ["50 ms", "60 ms", "+20.0% slower", f"{error:.1%}"] and status == 1
    assert text.endswith("old.json:\n\n- operator 8x12x197x64 batch float32 forward sdpa\n\n")


@pytest.mark.parametrize(
    ("ms", "rounds", "iqr", "expected"),
    [
        (52, 400, 0.001, 0),  # under 5 %
        (53, 400, 0.001, 1),
        (53, 4, 0.1, 0),  # under three standard errors, of 6.6 %
        (70, 4, 0.1, 1),
        (70, 1, 0, 0),  # nothing is known of the noise
    ],
)
def test_noise(compare, ms, rounds, iqr, expected):
    old, new = (comparison("operator", {"cpu": each}, rounds=rounds, iqr=iqr) for each in (50, ms))
    assert compare(old, new)[0] == expected


def test_masks_are_problems_of_their_own(compare):
    old, new = (
        [each for mask, ms in times.items() for each in comparison("masks", {"cpu": ms}, mask=mask)]
        for times in ({"padding": 50, "causal": 30}, {"padding": 50, "causal": 60})
    )
    status, changes, _ = compare(old, new)
    assert status == 1 and [row[0] for row in changes] == ["masks 8x12x197x64 batch causal float32 forward"]


def test_benchmarks_match_by_problem_and_direction(compare):
    old = comparison("operator", {"cpu": 50}) + comparison("operator", {"cpu": 50}, heads=6)
    new = comparison("operator", {"cpu": 90}, "forward+backward") + comparison("operator", {"cpu": 50}, heads=6)
    status, changes, text = compare(old, new)
    assert status == 0 and not changes and "0 of 1 changed" in text
    assert "old.json:\n\n- operator 8x12x197x64 batch float32 forward cpu\n\nOnly in" in text
    assert text.endswith("new.json:\n\n- operator 8x12x197x64 batch float32 forward+backward cpu\n\n")


def test_other_devices_are_refused(tmp_path, capsys):
    paths = [str(write(tmp_path / f"{m['device']}.json", *everything(), machine=m)) for m in (CPU, GPU)]
    with pytest.raises(SystemExit, match="2"):
        report.main(["--compare", *paths])
    assert "times of different devices, Some CPU and Some GPU, do not compare" in capsys.readouterr().err
    # In tables they stand one after the other.
    assert report.main(paths) == 0
    out = capsys.readouterr().out
    assert out.index("## Some CPU") < out.index("## Some GPU")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "No such file or directory"),
        ("{", "is not JSON"),
        ("[]", "is not a file of this suite"),
        ('{"machine_info": {}, "benchmarks": []}', "is not a file of this suite: KeyError('reattn')"),
        (
            '{"machine_info": {"reattn": {}}, "benchmarks": [{"extra_info": {}, "stats": {}}]}',
            "is not a file of this suite: KeyError('kind')",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, contents, message):
    path = tmp_path / "result.json"
    if contents is not None:
        path.write_text(contents)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path)])
    printed = capsys.readouterr()
    assert f"error: {path}" in printed.err and message in printed.err and not printed.out


def test_a_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    assert f"{tmp_path}: Is a directory" in capsys.readouterr().err


def test_a_benchmark_that_two_files_have_is_refused(tmp_path, capsys):
    paths = [str(write(tmp_path / name, *everything())) for name in ("a.json", "b.json")]
    with pytest.raises(SystemExit, match="2"):
        report.main(paths)
    expected = f"{paths[0]} and {paths[1]} both have operator 8x12x197x64 batch float32 forward triton: use --compare"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["a.json", "--docs"], ["--compare", "a", "b", "--docs"], ["--docs", "--out", "x"]]
)
def test_one_thing_at_a_time(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)
    assert "error: " in capsys.readouterr().err


def test_tables_need_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = str(write(tmp_path / "result.json", *everything()))
    assert report.main([path]) == 0
    assert "Some CPU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        report.main([path, "--out", str(tmp_path / "out")])
    assert "pip install 'reattn[analysis]'" in capsys.readouterr().err


def section(*comparisons):
    entries = [report._entry(benchmark) for each in comparisons for benchmark in each]
    return report.make_section("some-cpu", [report.Run(None, CPU, entries)])


def test_what_there_is_to_draw():
    assert list(report.plots(section(*everything()))) == ["speed-up", "roofline", "scaling"]
    assert list(report.plots(section(*scaling()))) == ["scaling"]
    assert not report.plots(section(comparison("model", {"cpu": 1}, "inference")))


def test_the_plot_of_speed_ups():
    pytest.importorskip("matplotlib")
    forward, both = report.plots(section(*everything()))["speed-up"]().axes
    assert [tick.get_text() for tick in forward.get_yticklabels()] == [
        "8x12x197x64 batch float32, triton",
        "8x12x197x64 batch float32, cuda",
        "8x12x197x64 batch bfloat16, triton",
    ]
    peers, sdpa = (
        [(round(bar.get_x() + bar.get_width(), 6), round(bar.get_y() + 0.19, 2)) for bar in bars]
        for bars in forward.containers
    )
    assert peers == [(2, -0.2), (1.25, 0.8)] and sdpa == [(0.8, 0.2), (0.5, 1.2), (0.8, 2.2)]
    assert both.get_title() == "forward+backward" and [1 + bar.get_width() for bar in both.containers[0]] == [1.25]
    # No bar against what was not measured.
    assert both.get_legend_handles_labels()[1] == ["over the best peer"]


def test_the_plot_of_scaling():
    pytest.importorskip("matplotlib")
    time, memory = report.plots(section(*scaling((512, 128, 1024, 256))))["scaling"]().axes
    assert (time.get_xscale(), time.get_yscale()) == ("log", "log")
    assert {line.get_label(): list(line.get_xdata()) for line in memory.lines} == {
        "cpu, $N^{1.00}$": [128, 256, 512, 1024],
        "eager, $N^{2.00}$": [128, 256, 512],
    }
    assert list(memory.lines[0].get_ydata()) == pytest.approx([1.28, 2.56, 5.12, 10.24])
    assert time.lines[0].get_ydata()[-1] == pytest.approx(1024**2 / 1e4)


def test_the_roofline():
    pytest.importorskip("matplotlib")
    (axes,) = report.plots(section(*everything()))["roofline"]().axes
    lines = {line.get_label(): line for line in axes.lines}
    points = lines["triton, float32, forward"]
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([40], [pytest.approx(4e9 / 50e-3)])
    assert points.get_fillstyle() == "full"
    assert lines["triton, float32, forward+backward"].get_fillstyle() == "none"
    ceiling = lines["bfloat16: matrix product 200 GFLOP/s"]
    assert list(ceiling.get_xdata()) == [5, 20, 80]
    assert list(ceiling.get_ydata()) == [5e10, 2e11, 2e11]
    # Of the dtypes that were measured.
    (axes,) = report.plots(section(everything()[0]))["roofline"]().axes
    assert [line.get_label() for line in axes.lines][2:] == ["float32: matrix product 100 GFLOP/s"]


def test_out_holds_the_report_and_its_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "result.json", *everything())
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert capsys.readouterr().out == text
    names = {f"some-cpu-{name}.png" for name in ("speed-up", "roofline", "scaling")}
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"report.md", *names}
    assert all(f"]({name})\n" in text for name in names)


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Folders of results and of documents, for --docs."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "benchmarks.md")
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    return tmp_path


def test_the_documents_have_every_device(documents, capsys):
    pytest.importorskip("matplotlib")
    write(documents / "results" / "a-cpu" / "operator.json", *everything()[:4])
    write(documents / "results" / "a-cpu" / "scaling.json", *scaling())
    write(documents / "results" / "b-gpu" / "all.json", *everything(), machine=GPU)
    write(documents / "results" / "c" / "other.json", [{"stats": {}, "extra_info": {}}])
    assert report.main(["--docs"]) == 0
    text = (documents / "docs" / "benchmarks.md").read_text()
    assert text.startswith("# Benchmarks\n") and "do not\nedit" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Some GPU", "## Some CPU, avx2"]
    assert "`operator.json`" in text and "`scaling.json`" in text
    pictures = {f"{device}-{name}.png" for device in ("b-gpu", "a-cpu") for name in ("speed-up", "roofline", "scaling")}
    assert {each.name for each in (documents / "docs" / "benchmarks").iterdir()} == pictures
    assert all(f"](benchmarks/{name})\n" in text for name in pictures)
    assert "left out: " in (error := capsys.readouterr().err) and "other.json" in error


def test_without_results_the_documents_say_so(documents):
    assert report.main(["--docs"]) == 0
    assert (documents / "docs" / "benchmarks.md").read_text().endswith("\n\nThere are no results yet.\n")


@pytest.mark.skipif(not report.PAGE.is_file(), reason="docs/benchmarks.md is not there yet")
def test_the_document_is_up_to_date():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.committed()), "make it anew with --docs"
