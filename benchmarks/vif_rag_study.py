"""VIF-RAG's cross-validation and acceptance against a known truth: writes results/vif_rag_study.records.json.

Run ``python benchmarks/vif_rag_study.py [--data FollowRAG file or folder]`` (minutes on one core). The supervision model is
SIMULATED: this measures the filters, nothing about a model. Of the official data only counts are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.evals.vif_rag import FollowRAG, contradictory, filter_responses, load_followrag
from broadsheet.methods.evals.vif_rag.synthesis import VerifierSet, aback_translate, asynthesize_verifiers
from broadsheet.methods.evals.vif_rag.world import Library, SimSupervisor

RESULTS = Path(__file__).parent / "results" / "vif_rag_study.records.json"
SEEDS = range(3)


def record(
    metric: str, values: list[float], groups: list[str] | None = None, seed: int = 0, model: str = "", **setting
) -> Record:
    return Record(
        paper="vif-rag", method="vif-rag", bench="vif-rag-study", metric=metric, value=sum(values) / len(values),
        ci=bootstrap_ci(values, groups), n=len(values), seed=seed, model=model, setting=setting, time=now(), **provenance(),
    )  # fmt: skip


def verifiers(library: Library, world: SimSupervisor, seed: int, check: bool = True) -> list[VerifierSet]:
    chat = Chat(SimulatedChat(world, name="sim:supervisor", seed=seed))
    return chat.map(lambda text: asynthesize_verifiers(chat, text, executor=library.run, check=check), list(library.atoms))


def purity(library: Library) -> list[Record]:
    """The share of right functions, with and without cross-validation; how many right ones and instructions are kept."""
    rows = []
    cells = [(p, label, same) for same in (False, True) for p in (0.3, 0.45, 0.6, 0.75) for label in (0.85,)]
    for p_function, p_label, correlated in [*cells, (0.6, 0.95, False)]:
        for seed in SEEDS:
            world = SimSupervisor(library, p_function, p_label, correlated=correlated)
            setting = {"p_function": p_function, "p_label": p_label, "correlated": correlated}
            right = {}
            for check in (False, True):
                made = verifiers(library, world, seed, check)
                pairs = [(one.instruction, function) for one in made for function in one.functions]
                right[check] = {pair for pair in pairs if library.right(*pair)}
                values, groups = [float(pair in right[check]) for pair in pairs], [text for text, _ in pairs]
                rows.append(record("purity", values, groups, seed, "sim:supervisor", filtered=check, **setting))
                kept = [float(not one.rejected) for one in made]
                rows.append(record("instructions_kept", kept, None, seed, "sim:supervisor", filtered=check, **setting))
            survived = [float(pair in right[True]) for pair in sorted(right[False])]
            groups = [text for text, _ in sorted(right[False])]
            rows.append(record("right_kept", survived, groups, seed, "sim:supervisor", **setting))
    return rows


def back_translation(library: Library) -> list[Record]:
    """The share of right functions after cross-validation, and after back-translation too, by how good the judge is."""
    rows = []
    for correlated in (False, True):
        for p_nli in (0.7, 0.9):
            for seed in SEEDS:
                world = SimSupervisor(library, 0.45, correlated=correlated, p_nli=p_nli)
                chat = Chat(SimulatedChat(world, name="sim:supervisor", seed=seed))
                made = chat.map(lambda text: asynthesize_verifiers(chat, text, executor=library.run), list(library.atoms))  # noqa: B023
                told = chat.map(lambda one: aback_translate(chat, one), made)  # noqa: B023
                for step, sets in (("cross-validation", made), ("back-translation", told)):
                    pairs = [(one.instruction, function) for one in sets for function in one.functions]
                    right, groups = [float(library.right(*pair)) for pair in pairs], [text for text, _ in pairs]
                    setting = {"after": step, "p_function": 0.45, "p_nli": p_nli, "correlated": correlated}
                    rows.append(record("purity_after", right, groups, seed, "sim:supervisor", **setting))
                    kept = [float(bool(one.functions)) for one in sets]
                    rows.append(record("instructions_after", kept, None, seed, "sim:supervisor", **setting))
    return rows


def acceptance(library: Library) -> list[Record]:
    """Of answers that obey half the time: the share of accepted ones that do, and how many are accepted."""
    rows = []
    for p_function in (0.45, 0.6):
        for seed in SEEDS:
            made = [one for one in verifiers(library, SimSupervisor(library, p_function), seed) if not one.rejected]
            for accept in ("any", "majority", "all"):
                obeys, groups, taken = [], [], []
                for one in made:
                    atom = library.atoms[one.instruction]
                    kept = set(filter_responses(one, atom.texts, accept, library.run))
                    taken += [float(text in kept) for text in atom.texts]
                    obeys += [float(atom.true(text)) for text in sorted(kept)]
                    groups += [one.instruction] * len(kept)
                setting = {"accept": accept, "p_function": p_function, "p_response": 0.5}
                rows.append(record("precision", obeys, groups, seed, "sim:supervisor", **setting))
                rows.append(record("accepted", taken, None, seed, "sim:supervisor", **setting))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", default=[], help="FollowRAG files")
    parser.add_argument("--count", type=int, default=210, help="instructions")
    parser.add_argument("--out", default=str(RESULTS))
    given = parser.parse_args()
    library = Library(given.count)
    rows = purity(library) + back_translation(library) + acceptance(library)
    items = FollowRAG(count=200).items()
    rows.append(record("contradictory", [contradictory([item]) for item in items], data="own"))
    for path in given.data:
        items = load_followrag(path)
        rows.append(record("contradictory", [contradictory([item]) for item in items], data=items[0].source))
    write_results(rows, given.out)
    for row in rows:
        low, high = row.ci or (0, 0)
        print(f"{row.metric:<18} {row.value:.3f} [{low:.3f}, {high:.3f}]  n={row.n:<5} seed {row.seed} {row.setting}")


if __name__ == "__main__":
    main()
