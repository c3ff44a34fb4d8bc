"""72 papers, well-formed, quick to load."""

import subprocess
import sys
import time

import pytest

from broadsheet import method, resolve
from broadsheet.catalogue import FAMILIES, paper, papers, search


def test_there_are_72_and_each_is_complete():
    assert len(papers()) == 72
    for entry in papers().values():
        assert entry.family in FAMILIES
        assert 3 <= entry.summary.count(". ") + 1 <= 6
        assert 3 <= len(entry.claims) <= 6
        assert len({claim.id for claim in entry.claims}) == len(entry.claims)
        for claim in entry.claims:
            assert bool(claim.test) != bool(claim.reason), (entry.slug, claim.id)
            assert not (claim.check and claim.reason)


def test_methods_and_checks_resolve():
    for entry in papers().values():
        if entry.method:
            assert resolve(entry.method) is method(entry.slug)
        for claim in entry.claims:
            if claim.check:
                assert callable(resolve(claim.check))


def test_loading_is_quick_and_imports_no_torch():
    code = "import sys, broadsheet.catalogue as c; c.papers(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    papers.cache_clear()
    start = time.process_time()
    papers()
    assert time.process_time() - start < 0.25


def test_search():
    assert "gear" in [p.slug for p in search("kv-cache quantisation")]
    assert search("no such words anywhere") == []


def test_unknown_slugs_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean gear"):
        paper("gaer")
    planned = next(p.slug for p in papers().values() if not p.method)
    with pytest.raises(ValueError, match="does not run yet"):
        method(planned)
