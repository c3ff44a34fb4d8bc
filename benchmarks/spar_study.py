"""When does a tree of refinements pay? SPaR's search in a world of known rates, at matched generations.

    python benchmarks/spar_study.py [--items 500] [--seeds 3] [--ifeval FOLDER]

From the same negatives: breadth-first search (and depth-first, on the first seed), a greedy chain and best of 15, 15
generations at most each, in four worlds, those where the tree loses too; what is wrong among what a weak judge accepts; how
alike the answers of a pair are, refined and independent ones; and IFEval's own prompts, right by the official checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from _loops import Study

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.methods.evals.checkable import Checkable, make_requests
from broadsheet.methods.evals.spar import SPaR
from broadsheet.methods.evals.spar.world import SimSPaR

#: constraints, lock, fix
WORLDS = ((8, 0.0, 0.6), (8, 0.3, 0.6), (12, 0.15, 0.6), (16, 0.2, 0.7))
GENERATIONS = 15
POLICIES = {
    "bfs": SPaR(budget=GENERATIONS),
    "dfs": SPaR(budget=GENERATIONS, algorithm="dfs"),
    "chain": SPaR(budget=GENERATIONS, branch=1, keep=1, depth=GENERATIONS),
    "best-of-15": SPaR(budget=GENERATIONS),
}


def policies(study: Study, chat: Chat, requests: Sequence[Checkable], wanted: int, seed: int, **setting: Any) -> None:
    """All policies from the same rejected answers, ``wanted`` of them at most."""
    tree = POLICIES["bfs"]

    async def first(request: Checkable) -> Any:
        [draft] = await tree._sample(chat, request.prompt, 0)
        return request, draft.text, await tree.judge(chat, request.prompt, draft.text, tries=1)

    roots = [root for root in chat.map(first, requests) if root[2].decided and root[2].value < 0.5][:wanted]
    for name, policy in POLICIES.items():
        if name == "dfs" and seed:
            continue  # the variant is shown once; the claim is about the others

        async def one(root: Any, name: str = name, policy: SPaR = policy) -> Any:
            request, text, said = root
            if name == "best-of-15":
                return await policy.abest_of(chat, request.prompt, None, GENERATIONS, first=1)
            return await policy.asearch(chat, request.prompt, text, said)

        results = chat.map(one, roots)
        right = [float(all(root[0].state(result.text))) for root, result in zip(roots, results, strict=True)]
        study.add(name, "right", right, seed, **setting)
        study.add(name, "generations", [float(result.generations) for result in results], seed, **setting)
        study.add(name, "accepted", [float(result.accepted) for result in results], seed, **setting)
        precise = [ok for ok, result in zip(right, results, strict=True) if result.accepted]
        study.add(name, "acceptance_precision", precise, seed, **setting)


def worlds(study: Study, seed: int) -> None:
    items = study.arguments.items
    for constraints, lock, fix in WORLDS:
        requests = make_requests(2 * items, constraints, seed)
        chat = Chat(SimulatedChat(SimSPaR(requests, lock=lock, fix=fix), "sim:spar", seed))
        policies(study, chat, requests, items, seed, part="worlds", constraints=constraints, lock=lock, fix=fix)
    for lock in (0.0, 0.15):
        requests = make_requests(2 * items, 5, seed)
        chat = Chat(SimulatedChat(SimSPaR(requests, lock=lock, vote=0.75), "sim:spar", seed))
        policies(study, chat, requests, items // 2, seed, part="weak judge", constraints=5, lock=lock, fix=0.6)


def pairs(study: Study, seed: int) -> None:
    requests = make_requests(100, 6, seed)
    chat = Chat(SimulatedChat(SimSPaR(requests, lock=0.1), "sim:spar", seed))
    for name, method in (("refined", SPaR()), ("independent", SPaR(refined=False))):
        built = method.pairs(chat, [request.prompt for request in requests])
        study.add(name, "similarity", [row["similarity"] for row in built.rows], seed, part="pairs")
        right = {request.prompt: request for request in requests}
        chosen = [right[row["prompt"][0]["content"]].state(row["chosen"][0]["content"]) for row in built.rows]
        study.add(name, "chosen_right", [float(all(state)) for state in chosen], seed, part="pairs")


def main() -> None:
    study = Study.start("spar-study", "spar", __doc__, items=500)
    prompts = study.ifeval()[::2]
    for seed in range(study.arguments.seeds):
        worlds(study, seed)
        pairs(study, seed)
        if prompts:
            chat = Chat(SimulatedChat(SimSPaR(prompts, satisfied=0.6), "sim:spar", seed))
            policies(study, chat, prompts, len(prompts), seed, part="ifeval")
        study.write()


if __name__ == "__main__":
    main()
