"""FlexSP's claims: no verdict without records, one that can fail with them."""

from dataclasses import replace
from pathlib import Path

import pytest

from broadsheet.core.records import read_json
from broadsheet.core.verdicts import DIRECTION, FAILS, HOLDS
from broadsheet.methods.estimates.claims_flexsp import over_adaptive, over_static

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "flexsp_study.records.json"


@pytest.mark.parametrize("check", [over_static, over_adaptive])
def test_verdicts_follow_the_records(check):
    assert check([]) is None
    records = list(read_json(RESULTS))
    verdict, text = check(records)
    assert verdict in (HOLDS, DIRECTION)
    assert text.startswith("SIMULATED")

    def times(factor):
        changed = []
        for record in records:
            if record.metric in ("speedup", "worst_speedup") and record.setting["part"] == "planners":
                ci = record.ci and tuple(factor * end for end in record.ci)
                record = replace(record, value=factor * record.value, ci=ci)
            changed.append(record)
        return changed

    assert check(times(0.8))[0] == DIRECTION
    assert check(times(0.5))[0] == FAILS
