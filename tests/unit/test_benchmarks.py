"""The frame of the benchmarks: one that cannot run harms no other, the README keeps what is not ours."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import report  # noqa: E402
from figure import Figure, in_turn, median_ratio  # noqa: E402


@pytest.fixture
def benches(tmp_path, monkeypatch):
    def write(name, text):
        (tmp_path / f"bench_{name}.py").write_text(text)

    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield write
    for name in [name for name in sys.modules if name.startswith("bench_")]:
        del sys.modules[name]


def test_a_benchmark_that_cannot_run_says_why_and_the_others_go_on(benches):
    benches("aa", "def measure():\n    yield {'name': 'half'}\n    raise RuntimeError('no\\n guest here')\n")
    benches("bb", "from figure import Figure\ndef measure():\n    return [Figure('good', 2.0, 's', '<= 3', True)]\n")
    assert report.names() == ["aa", "bb"]
    failed, good = report.measure(report.names())
    assert (failed["bench"], failed["value"], failed["ok"]) == ("aa", None, None)
    assert failed["note"] == "RuntimeError: no guest here"
    assert (good["bench"], good["name"], good["value"]) == ("bb", "good", 2.0)
    assert "not measured" in report.table([failed]) and "2 s | <= 3 | yes" in report.table([good])


def test_cells_cannot_break_the_table():
    row = report.table([Figure("a|b", 12345.6, "MB", "", None).to_dict()]).splitlines()[-1]
    assert row == "| a\\|b | 12,346 MB |  |  |  |"


def test_the_readme_keeps_what_stands_around_the_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(readme, "new")
    report.update(readme, "newer")
    assert readme.read_text() == f"before\n{report.BEGIN}\nnewer\n{report.END}\nafter\n"


def test_a_readme_without_the_marks_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("text")
    with pytest.raises(SystemExit, match="want the lines"):
        report.update(readme, "new")
    assert readme.read_text() == "text"


def test_the_storage_page_gets_its_table_and_its_plot(tmp_path):
    from xml.etree import ElementTree

    import storage_plot

    page = tmp_path / "storage.md"
    page.write_text(f"before\n{storage_plot.BEGIN}\nold\n{storage_plot.END}\nafter\n")
    found = {name: [1.0, 30.0, 2.0] for name, _ in storage_plot.COLUMNS}
    bare = {name: [4.0] for name, _ in storage_plot.RATES}
    curves = {"sshfs": [(1, 40.0, 20.0), (16, 10.0, 5.0)], "other": [(1, 20.0, 20.0), (16, 40.0, 40.0)]}
    storage_plot.document({"sshfs": found, "bare": bare}, {"9p": "no 9p here"}, curves, tmp_path, 3)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| sshfs | 2 | 2 |" in text and "| 9p | not measured: no 9p here |" in text and "39.5-112" in text
    drawn = ElementTree.parse(tmp_path / storage_plot.PLOT).getroot()
    assert [each.text for each in drawn.iter() if each.text and each.text.startswith("sshfs")] == ["sshfs"]
    assert f"({storage_plot.PLOT})" in text and f"({storage_plot.CURVE})" in text
    assert "| 2 | 30 |" in text  # the most files of a round
    assert "| bare | 4 | 4 |  |" in text and "| sshfs, write, MiB/s in all | 40 | 10 |" in text
    lines = ElementTree.parse(tmp_path / storage_plot.CURVE).getroot().iter("{http://www.w3.org/2000/svg}polyline")
    drawn = [(line.get("points"), line.get("stroke-dasharray")) for line in lines]
    assert drawn[:2] == [("50.0,30.0 470.0,150.0", None), ("50.0,110.0 470.0,170.0", None)]
    assert drawn[2:] == [("50.0,110.0 470.0,30.0", "6 4")] * 2


def test_a_page_without_clients_has_no_second_plot(tmp_path):
    import storage_plot

    (tmp_path / "storage.md").write_text(f"{storage_plot.BEGIN}\n{storage_plot.END}\n")
    storage_plot.document({"bare": {name: [4.0] for name, _ in storage_plot.RATES}}, {}, {}, tmp_path, 1)
    assert storage_plot.CURVE not in (tmp_path / "storage.md").read_text()
    assert not (tmp_path / storage_plot.CURVE).exists()


def load(part, folder, mib=2, files=20, patience=None):
    text = (Path(report.__file__).parent / "storage_load.py").read_text()
    if patience is not None:
        text = text.replace("PATIENCE_S, FOLDERS = 200, 10.0", f"PATIENCE_S, FOLDERS = 200, {patience}")
    argv = [sys.executable, "-I", "-c", text, part, str(folder), "n", "file", str(mib), str(files)]
    return subprocess.run(argv, capture_output=True, text=True)


def test_the_load_measures_all_that_the_table_shows(tmp_path):
    import bench_storage

    found = {}
    for part in bench_storage._parts(bench_storage.NATIVE)[:3]:
        done = load(part, tmp_path)
        assert done.returncode == 0, done.stderr
        found |= json.loads(done.stdout)
    assert {*bench_storage.LARGE, *bench_storage.DIRECT, *bench_storage.SMALL} - {"git status"} <= found.keys()
    assert found["files"] == 20
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_load_has_patience_for_so_much_and_counts_what_it_did(tmp_path):
    assert load("large", tmp_path).returncode == 0
    found = json.loads(load("small", tmp_path, files=10_000, patience=0).stdout)
    assert found["files"] == 1


def test_the_tree_that_git_looks_at_is_as_it_was_committed(tmp_path, monkeypatch):
    import bench_storage

    monkeypatch.setattr(bench_storage, "TREE", 60)
    bench_storage._plant(tmp_path / "tree")
    done = load("git", tmp_path, files=60)
    assert json.loads(done.stdout)["git status"] > 0, done.stderr
    (tmp_path / "tree/d1/f51").write_text("another\n")
    assert "M d1/f51" in load("git", tmp_path).stderr


def test_cpu_is_told_for_each_gib_and_there_is_none_of_a_guest_on_the_host():
    import bench_storage

    gib = bench_storage.MIB / 1024
    found = {"write": 1.0, "write cpu": gib, "read cpu": 3 * gib, "host": 8 * gib}
    told = bench_storage._for_each_gib(dict(found), native=False)
    assert told == {"write": 1.0, "write cpu": 1.0, "read cpu": 3.0, "host CPU": 4.0}
    assert bench_storage._for_each_gib(dict(found), native=True) == {"write": 1.0, "host CPU": 2.0}


def test_ratios_of_ways_that_are_missing_are_none():
    import bench_storage

    results = {"a": {"read": [2.0, 8.0, 3.0]}, "b": {"read": [1.0, 2.0, 1.0]}}
    assert bench_storage.ratio(results, "a", "read", "b") == 3
    assert bench_storage.ratio(results, "a", "write", "b") is None
    assert bench_storage.ratio(results, "a", "read") is None
    missing = {"virtiofs": "no daemon"}
    notes = {figure.name: figure.note for figure in bench_storage._goals(results, missing)}
    assert notes["sshfs, channel against virtiofs: read"] == "no daemon"


def test_a_mount_is_timed_alone_and_beside_others():
    import storage_attach

    calls = []

    @contextmanager
    def others(count):
        calls.append(count)
        yield
        calls.append("gone")

    once = (lambda: calls.append("up"), lambda: calls.append("down"), lambda: calls.append("settled"))
    figures = list(storage_attach._both("kind", None, lambda guest: ("what", "others", once, others)))
    assert [figure.name for figure in figures] == ["kind, attach + detach, 1 lease", "kind, attach + detach, 50 leases"]
    runs = ["up", "down", "settled"] * storage_attach.RUNS
    assert calls == [*runs, 49, *runs, "gone"]


def test_clients_are_compared_with_one():
    import storage_clients

    assert storage_clients.figures({})[0].value is None
    wrote, read = storage_clients.figures({"sshfs": [(1, 10.0, 20.0), (16, 5.0, 40.0)]})
    assert (wrote.value, read.value) == (0.5, 2.0) and "16: 40 MiB/s" in read.note


def test_ratios_are_taken_pair_by_pair():
    assert median_ratio([2, 4, 60], [1, 2, 6]) == 2
    order = []
    first, second = in_turn(lambda: order.append("a"), lambda: order.append("b"), 2)
    assert order == ["a", "b", "a", "b"] and len(first) == len(second) == 2
