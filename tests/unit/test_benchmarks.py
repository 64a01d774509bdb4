"""The frame of the benchmarks: one that cannot run harms no other, the README keeps what is not ours."""

import sys
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
    storage_plot.document({"sshfs": found}, {"9p": "no 9p here"}, tmp_path, 3)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| sshfs | 2 | 2 |" in text and "| 9p | not measured: no 9p here |" in text and "39.5-112" in text
    drawn = ElementTree.parse(tmp_path / storage_plot.PLOT).getroot()
    assert [each.text for each in drawn.iter() if each.text and each.text.startswith("sshfs")] == ["sshfs"]
    assert f"({storage_plot.PLOT})" in text


def test_ratios_are_taken_pair_by_pair():
    assert median_ratio([2, 4, 60], [1, 2, 6]) == 2
    order = []
    first, second = in_turn(lambda: order.append("a"), lambda: order.append("b"), 2)
    assert order == ["a", "b", "a", "b"] and len(first) == len(second) == 2
