from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import donor_index
from rksc_sgl.similarity.alignment import align


def test_a_prompt_shares_its_donors_material_in_another_order() -> None:
    donor, prompt = donor_index.prefix(3, 500), donor_index.prompt(3, 500)
    found = align(donor, prompt)
    assert found.aligned == len(prompt) - donor_index.OPENING
    assert len({span.shift for span in found.spans}) == 3
    assert align(donor_index.prefix(4, 500), prompt).aligned == donor_index.TEMPLATE
    assert np.array_equal(donor_index.prompt(3, 500), prompt)


def test_the_last_line_tells_the_figures_of_the_largest_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert donor_index.main(["--prefixes", "2000", "--tokens", "200", "--samples", "20"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    assert list(result) == ["lookup_us_p50_2k", "lookup_us_p95_2k", "bytes_per_prefix", "found"]
    assert result["found"] == 1.0
    assert 0 < result["lookup_us_p50_2k"] <= result["lookup_us_p95_2k"]
    assert 200 < result["bytes_per_prefix"] <= donor_index.BYTES_PER_PREFIX
    assert any("1,000" in line for line in lines) and any("2,000" in line for line in lines)


def test_sizes_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        donor_index.main(["--prefixes", "0"])
    assert "needs at least 1 prefix" in capsys.readouterr().err
