"""The suite, its files of results, the page, and the tables of README and docs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import report, suite, tables
from benchmarks.charts import Bar, Point, lines, scatter, stacked_bars
from benchmarks.result_files import read, write
from benchmarks.suite import Benchmark
from rksc_sgl.errors import RkscError
from tests.made_up_results import write_ablation, write_load, write_pipeline


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_the_tables_are_those_of_the_files_of_results(name: str) -> None:
    text = (tables.ROOT / name).read_text()
    assert tables.PLACE.search(text), "no table of results"
    assert text == tables.filled(text), "run: python -m benchmarks.tables"


def test_a_table_follows_its_file(tmp_path: Path) -> None:
    places = "".join(f"<!-- rksc bench: {name} -->\n<!-- end -->\n" for name in tables.TABLES)
    assert tables.filled(places, tmp_path).count(tables.MISSING) == len(tables.TABLES)
    write_pipeline(tmp_path)
    assert tables.filled(places, tmp_path).count(tables.MISSING) == 2, "of two files that are not there"
    write_ablation(tmp_path)
    write_load(tmp_path)
    filled = tables.filled(places, tmp_path)
    assert tables.MISSING not in filled
    assert "| siblings_wait | together | every branch computes its prompt | 2.00 (2.00 to 2.00) | 1.00" in filled
    assert "| answers 100%, again 100% |" in filled and "Not measured: certified_exit (no profile)." in filled
    assert "| 16 | time to first token, p99, ms | 2.0 | 0.50 (0.50 to 0.50) | 2.00 (2.00 to 2.00) | 1.00" in filled
    assert "| 8 branches of one prompt, over no KV reuse | 3.008 mean, 3.990 peak | **8.00** (8.00 to 8.00) |" in filled
    assert "same answer in 100%, stock's own in 50%" in filled and "Equal tokens in all arms: yes" in filled
    assert "| identical | 16 | 1024 | 8.00" in filled and "| 32 | certain |" in filled
    assert tables.filled(filled, tmp_path) == filled
    write_pipeline(tmp_path, equal_tokens=False)
    assert "Equal tokens in all arms: NO" in tables.filled(filled, tmp_path)
    with pytest.raises(RkscError, match="there is no such table"):
        tables.filled("<!-- rksc bench: other -->\n<!-- end -->", tmp_path)


def test_the_page_has_every_chart_and_needs_nothing_else(tmp_path: Path) -> None:
    write_pipeline(tmp_path)
    policies = {"certain": {"8": {"answer_same_as_full": 1.0, "same_lower95": 0.9, "tokens_fraction": 0.6}}}
    write(tmp_path / "sibling_stop.json", "sibling_stop", {"policies": policies, "problems": 40}, command="x <y>")
    charts = re.findall(r"<svg.*?</svg>", report.make(tmp_path).read_text())
    assert len(charts) == 5 + 5 + 4 + 2 + 1  # stages, reuse, sizes, defaults, stopping
    write_ablation(tmp_path)
    write_load(tmp_path)
    text = report.make(tmp_path).read_text()
    charts = re.findall(r"<svg.*?</svg>", text)
    assert len(charts) == 17 + 1 + 4  # ablation, load
    for chart in charts:
        ElementTree.fromstring(chart)
    assert not re.search(r"(src|href)=|url\(|@import", text)
    assert "Not measured: certified_exit: no profile." in text and "2.00×; noise 1.00" in text
    assert "8.00×" in text and "x &lt;y&gt;" in text and "prefers-color-scheme" in text
    with pytest.raises(RkscError, match="has no files of results"):
        report.make(tmp_path / "none")


def test_bars_and_whiskers_are_as_long_as_their_values() -> None:
    drawn = stacked_bars([Bar("one", {"a": 2.0, "b": 4.0}, 5.0, 8.0), Bar("two", {"a": 1.0})], ["a", "b"], "s")
    widths = [float(one) for one in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01) and widths[2] == pytest.approx(widths[0] / 2, rel=0.01)
    first, last = map(float, re.search(r'class="whisker" d="M([\d.]+) [\d.]+H([\d.]+)', drawn).groups())  # type: ignore[union-attr]
    assert last - first == pytest.approx(1.5 * widths[0], rel=0.01)


def test_points_are_drawn_at_their_values() -> None:
    points = [Point(4, 1.0, 0.5, 1.5, "p"), Point(8, 2.0, 1.5, 2.5, "q")]
    for drawn in (lines({"<a>": points}, "x", "y"), scatter({"<a>": points}, "x", "y")):
        ElementTree.fromstring(drawn)
        (_, low), (_, high) = [map(float, one) for one in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
        assert low > high, "upwards is less in SVG"


@pytest.mark.slow
def test_a_benchmark_runs_in_a_process_of_its_own_and_leaves_a_file(tmp_path: Path) -> None:
    index = Benchmark("donor_index", "", ("--prefixes", "2000", "--tokens", "200", "--samples", "20"), model=False)
    suite.run(index, "a-model", tmp_path, quick=False)
    found = read(tmp_path / "donor_index.json")
    assert found["figures"]["found"] == 1.0 and found["made"]["sglang"] and found["made"]["cores"] >= 1
    assert found["command"] == "python -m benchmarks.donor_index --prefixes 2000 --tokens 200 --samples 20"
    with pytest.raises(RkscError, match="donor_index ended with exit code 2"):
        suite.run(Benchmark("donor_index", ""), "a-model", tmp_path, quick=False)  # knows no --model-path


def test_the_page_alone_is_made_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--report", "--out", str(tmp_path)]) == 1
    assert "make them: rksc bench" in capsys.readouterr().err
    write_pipeline(tmp_path)
    assert suite.main(["--report", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["report"] == str(tmp_path / "report.html")


def test_what_is_no_file_of_results_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ("[]", "{", "{}"):
        path.write_text(content)
        with pytest.raises(RkscError, match=r"a\.json"):
            read(path)
