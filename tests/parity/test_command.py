"""`python -m parity`: exit codes, reports, comparison, registries and mutants."""

import json

import pytest
import torch

from fade_fast.hf import cache as hf_cache
from fade_ref import rope
from parity import mutants, report, subjects, twins
from parity.__main__ import main
from parity.case import Case, Check, Draw, Found, perform, relative_error
from parity.mutants import Mutant
from parity.mutation import call, compare
from parity.subjects import codecs
from parity.tolerances import CLAIMS

from ..marks import slow_but

QUICK = ["--only", "codecs/packing, 4 bits"]


@pytest.fixture
def only(monkeypatch):
    """A function that lets some cases be all cases there are."""
    return lambda *cases: monkeypatch.setattr(subjects, "collect", lambda dtype=None: list(cases))


def good(found: Found, seed: int):
    found.same("packing", torch.arange(3), torch.arange(3))
    found.near("merge", 1e-16)


def bad(found: Found, seed: int):
    found.same("packing", torch.arange(3), torch.zeros(3), "here")


def broken(found: Found, seed: int):
    raise RuntimeError("a message\nof two lines")


def test_a_run_that_passes(tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("a.json", "a.md")]
    assert main([*QUICK, "--json", files[0], "--markdown", files[1]]) == 0
    said = capsys.readouterr().out
    assert "7 cases" in said and "none failed" in said and "packing, 4 bits" in said
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["commit"] is not None
    digests = [check["digest"] for case in found["cases"] for check in case["checks"] if "digest" in check]
    assert len(set(digests)) == len(digests) == 21
    assert "## Claims" in (tmp_path / "a.md").read_text()


@pytest.mark.slow
def test_processes_that_share_the_cases_find_the_same(tmp_path):
    found = []
    for jobs in ("1", "2"):
        path = tmp_path / f"{jobs}.json"
        assert main([*QUICK, "--jobs", jobs, "--json", str(path)]) == 0
        found.append(json.loads(path.read_text())["cases"])
    assert found[0] == found[1] and len(found[0]) == 7


@pytest.mark.slow
def test_every_subject_has_a_case_that_passes():
    """The whole takes minutes; one case of each group, but for the slow ones."""
    seen = set()
    for case in subjects.collect():
        key = (case.subject, case.group)
        if key not in seen and case.subject != "captured" and case.group != "presets" and not case.known:
            seen.add(key)
            outcome = perform(case)
            assert outcome.passed, (case.title, outcome.raised, outcome.checks)
    assert {subject for subject, _ in seen} >= {"registry", "codecs", "attention", "plans", "life"}


def test_a_failure_and_an_exception_fail_their_cases_only(only, capsys):
    runs = good, bad, broken, lambda found, seed: None
    only(*(Case("subject", "group", f"case {i}", run) for i, run in enumerate(runs)))
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "4 cases" in said and "3 failed" in said and "1 ok, 3 FAILED" in said
    assert "case 1: packing: 2 > 0 (here)" in said
    assert "case 2: RuntimeError: a message\n" in said
    assert "case 3: it checked nothing" in said


def test_known_bugs_are_shown_and_do_not_fail(only, capsys):
    only(Case("s", "g", "a", bad, known="a reason"), Case("s", "g", "b", good, known="another"))
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "known bug s/g/a: a reason" in said and "fixed s/g/b" in said


def test_what_cannot_run(capsys, tmp_path, monkeypatch):
    assert main(["--only", "nonesuch"]) == 2
    assert main(["mutate", "--only", "nonesuch"]) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert main([*QUICK, "--jobs", "0"]) == 2
    (tmp_path / "a.json").write_text("{}")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 2
    assert main(["compare", str(tmp_path / "none.json"), str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.count("error: ") == 6


@pytest.mark.slow
def test_compiled_cases_share_their_shapes(uncompiled_kernels):
    """Compiling a kernel takes seconds on a GPU: so many fit into minutes."""
    marked = [c for c in subjects.collect() if c.compiled and c.subject in ("attention", "codecs")]
    graphs = set()
    for case in marked:
        outcome = perform(case)
        graphs |= outcome.ran.graphs
        assert outcome.ran.graphs, case.title
        if "3 bits" not in case.title:  # their sums need the float32 of a compiled kernel
            assert outcome.passed, (case.title, outcome.raised, outcome.checks)
    assert len(graphs) < 65 and len(marked) > 1.8 * len(graphs)


def test_what_runs_compiled_is_chosen_and_told(uncompiled_kernels, only, tmp_path, capsys):
    every = [c for c in subjects.collect() if c.title.startswith("codecs/encode keys and values/4 bits z")]
    every += [Case("codecs", "encode keys and values", "unmarked", every[0].run)]
    only(*every)
    for choice, expected in (("none", [False, False]), ("some", [True, False]), ("all", [True, True])):
        path = tmp_path / f"{choice}.json"
        assert main(["--compiled", choice, "--json", str(path)]) == 0
        assert ["compiled" in case for case in report.read(path)["cases"]] == expected
        said = capsys.readouterr().out
        assert (f"{sum(expected)} cases ran compiled, 1 kernels" in said) == any(expected)
    assert not twins.fused("cuda") and twins.fused("cpu")


def test_compare(tmp_path, capsys):
    paths = [tmp_path / name for name in "ab"]
    assert main(["--only", "codecs/encode, 4 bits/D64", "--json", str(paths[0])]) == 0
    assert main(["--only", "codecs/codes of exact", "--json", str(paths[1])]) == 0
    found = [report.read(path) for path in paths]
    found[0]["cases"] += found[1]["cases"]

    def compared(change):
        report.write(found[0], paths[0])
        twin = json.loads(paths[0].read_text())
        change(twin["cases"])
        report.write(twin, paths[1])
        capsys.readouterr()
        return main(["compare", *map(str, paths)]), capsys.readouterr().out

    def digest(cases):
        cases[-1]["checks"][0]["digest"] = "0" * 64

    def error(cases):
        check = next(c for case in cases for c in case["checks"] if c["claim"] == "scales")
        check["error"] = 1e-4

    code, said = compared(lambda cases: None)
    assert code == 0 and said.count(": none\n") == 4
    found[0]["cases"][0]["checks"].append(dict(claim="no longer made", error=0.1, allowed=1.0))
    assert compared(lambda cases: None)[0] == 0
    code, said = compared(digest)
    assert code == 1 and "Bits that differ: 1" in said and "0" * 16 in said
    code, said = compared(error)
    assert code == 0 and "(allowed): 1" in said and "1.00e-04 in B" in said
    assert compared(lambda cases: cases.pop())[0] == 1
    assert compared(lambda cases: cases[0].update(passed=False))[0] == 1


def test_dtype_selects():
    every, some = subjects.collect(), subjects.collect(torch.bfloat16)
    assert len(some) < len(every) and {case.dtype for case in some} == {None, torch.bfloat16}


def test_a_scheme_or_codec_without_a_case_fails_the_run(monkeypatch, capsys):
    monkeypatch.setitem(rope.SCHEMES, "cubic", rope.default)
    monkeypatch.setattr(codecs, "CODECS", (*codecs.CODECS, "ternary"))
    assert main(["--only", "registry"]) == 1
    said = capsys.readouterr().out
    assert "scheme cubic has no case" in said and "KeyError: 'ternary'" in said


def test_what_a_cache_can_hold_without_a_checkpoint_fails_the_run(monkeypatch, capsys):
    assert main(["--only", "registry"]) == 0
    monkeypatch.setattr(hf_cache, "CODECS", (*hf_cache.CODECS, "ternary"))
    assert main(["--only", "registry"]) == 1
    assert "checkpoint of codec ternary has no case" in capsys.readouterr().out


def test_mutants_are_of_this_source():
    """Each finds its function and its operation as they are now, and has cases that may notice."""
    titles = [case.title for case in subjects.collect()]
    for mutant in mutants.MUTANTS:
        with mutants.corrupted(mutant):
            pass
        assert any(mutant.cases in title for title in titles), mutant


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["swapped nibbles", "stale position", "wrong tie order", "bounds not stored"], "swapped nibbles"
    ),
)
def test_mutants_are_caught(name, capsys):
    assert main(["mutate", "--only", name]) == 0
    assert "none survived" in capsys.readouterr().out
    assert main(["--only", "codecs/packing, 4 bits/D64"]) == 0  # and taken out again


def test_mutants_that_survive_or_are_stale(capsys):
    pack = "kernels.rotated.pack"
    harmless = Mutant("harmless", pack, compare("==")[0].becomes("_ or False"), "packing, 4")
    stale = Mutant("old", pack, call("nonesuch").drop(), "packing, 4")
    gone = Mutant("gone", "kernels.rotated.nonesuch", call("sum").drop(), "packing, 4")
    broken = Mutant("broken", pack, call("sum").becomes("nonesuch"), "packing, 4")
    assert mutants.main(mutants=[harmless, stale, gone, broken]) == 1
    said = capsys.readouterr().out
    assert said.count("SURVIVES") == 4 and "nothing, in 7 cases" in said
    assert said.count("stale: ") == 3 and "it breaks the function: NameError" in said


def test_mutants_are_many_and_unlike():
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 120
    assert len({(m.where, str(m.change)) for m in mutants.MUTANTS}) == len(mutants.MUTANTS)


def test_nan_and_other_shapes_never_pass():
    found = Found()
    found.same("packing", torch.zeros(2), torch.zeros(3))
    found.near("merge", float("nan"))
    assert not any(check.passed for check in found.finish())
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1).double()) == float("inf")
    assert Check("merge", 0.0, 0.0).passed


def test_inputs_lie_on_a_grid():
    x = Draw(0).normal(1000) * 4096
    assert torch.equal(x, x.round()) and 0.9 < float((x / 4096).std()) < 1.1


def test_every_claim_has_a_reason():
    assert all(len(claim.reason) > 20 for claim in CLAIMS.values())
