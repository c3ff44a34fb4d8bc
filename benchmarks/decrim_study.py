"""When does criticising by constraints pay? DeCRIM in a world of known rates, beside the exact chain and its rivals.

    python benchmarks/decrim_study.py [--items 700] [--seeds 3] [--ifeval FOLDER]

Written are, for every seed: the table of critics by rounds; DeCRIM, best of 11 with the same critic, vague
self-refinement and repeated constraints at 4, 8 and 12 constraints; the gain by recall, by omitted constraints and
around the point at which the loop stops helping; and IFEval's own prompts with the official checks as critic, whole
and degraded.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from _loops import Study

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.methods.evals.checkable import Checkable, make_requests
from broadsheet.methods.evals.decrim import BestOf, Corrected, DeCRIM, RepeatConstraints, SelfRefine
from broadsheet.methods.evals.decrim.markov import Rates, break_even
from broadsheet.methods.evals.decrim.world import SimCritic, SimWriter
from broadsheet.methods.evals.ifeval_world import Prompt, checker_as_critic

CRITICS = {"oracle": (1.0, 0.0), "strong": (0.9, 0.03), "weak": (0.6, 0.15), "coin": (0.5, 0.5), "inverted": (0.1, 0.6)}
METHODS: dict[str, Any] = {
    "decrim": DeCRIM(), "best-of-11": BestOf(), "self-refine": SelfRefine(), "repeat": RepeatConstraints(),
}  # fmt: skip


def solve(name: str, rates: Rates, items: int, seed: int) -> tuple[list[Any], list[Corrected]]:
    """Requests and one method's answers. Every method has its own stream of random numbers: it asks other prompts."""
    requests = make_requests(items, rates.constraints, seed)
    writer = Chat(SimulatedChat(SimWriter(requests, rates), "sim:writer", seed))
    critic = Chat(SimulatedChat(SimCritic(requests, rates), "sim:critic", seed))
    method = METHODS[name]

    async def one(request: Any) -> Corrected:
        listed = [feature.statement for feature in request.features]
        if name == "repeat":
            return await method.asolve(writer, request.prompt, constraints=listed)
        given = {"constraints": listed} if name == "best-of-11" else {}
        return await method.asolve(writer, request.prompt, critic, **given)

    return requests, writer.map(one, requests)


def add(
    study: Study,
    name: str,
    requests: Sequence[Checkable],
    answers: Sequence[Corrected],
    seed: int,
    rounds: int = 10,
    **setting: Any,
) -> None:
    """Shares of the answers after ``rounds`` rounds and, for the whole run, writer calls."""
    texts = [answer.text if rounds == 10 else answer.rounds[: rounds + 1][-1].text for answer in answers]
    states = [request.state(text) for request, text in zip(requests, texts, strict=True)]
    study.add(name, "instruction_level", [float(all(state)) for state in states], seed, rounds=rounds, **setting)
    study.add(name, "constraint_level", [statistics.fmean(state) for state in states], seed, rounds=rounds, **setting)
    if rounds == 10:
        study.add(name, "generations", [float(answer.generations) for answer in answers], seed, rounds=rounds, **setting)


def exact(study: Study, name: str, rates: Rates, rounds: int = 10, **setting: Any) -> None:
    outcome = {"decrim": rates.decrim, "self-refine": rates.vague, "best-of-11": lambda _: rates.best_of(11)}[name](rounds)
    for metric, value in zip(("instruction_level", "constraint_level", "generations"), outcome, strict=True):
        study.exact(name, metric, value, rounds=rounds, **setting)


def tables(study: Study, seed: int) -> None:
    items = study.arguments.items
    for critic, (recall, alarm) in CRITICS.items():
        rates = Rates(4, recall, alarm)
        requests, answers = solve("decrim", rates, items, seed)
        for rounds in (1, 3, 10):
            add(study, "decrim", requests, answers, seed, rounds, part="critics", critic=critic, constraints=4)
            if seed == 0:
                exact(study, "decrim", rates, rounds, part="critics", critic=critic, constraints=4)
    for constraints in (4, 8, 12):
        for critic in ("weak", "strong"):
            rates = Rates(constraints, *CRITICS[critic])
            # Vague refinement and repetition have no critic: they are measured once.
            for name in METHODS if (constraints, critic) == (4, "weak") else ("decrim", "best-of-11"):
                add(
                    study,
                    name,
                    *solve(name, rates, items, seed),
                    seed,
                    part="rivals",
                    critic=critic,
                    constraints=constraints,
                )
                if seed == 0 and name != "repeat":
                    exact(study, name, rates, part="rivals", critic=critic, constraints=constraints)
    for recall in (0.1, 0.3, 0.5, 0.7, 0.9):
        rates = Rates(4, recall, 0.1)
        add(study, "decrim", *solve("decrim", rates, items, seed), seed, part="recall", recall=recall)
        if seed == 0:
            exact(study, "decrim", rates, part="recall", recall=recall)
    for omitted in (0.0, 0.1, 0.3):
        rates = replace(Rates(4, *CRITICS["strong"]), omitted=omitted)
        add(study, "decrim", *solve("decrim", rates, items, seed), seed, part="omission", omitted=omitted)
        if seed == 0:
            exact(study, "decrim", rates, part="omission", omitted=omitted)


def stops_helping(study: Study, seed: int) -> None:
    """The accuracy of single verdicts at which the gain is zero, by the chain; and the engine's gain on both sides of it."""
    for constraints in (1, 2, 4, 8, 12):
        at = break_even(Rates(constraints))
        if seed == 0:
            study.exact("decrim", "break_even_accuracy", at, constraints=constraints)
        if constraints == 4:
            for accuracy in (at - 0.1, at, at + 0.1):
                rates = Rates(4, accuracy, 1 - accuracy)
                requests, answers = solve("decrim", rates, study.arguments.items, seed)
                gains = [
                    float(all(request.state(answer.text))) - float(all(request.state(answer.rounds[0].text)))
                    for request, answer in zip(requests, answers, strict=True)
                ]
                study.add(
                    "decrim", "gain", gains, seed, part="break-even", accuracy=round(accuracy, 3), exact=rates.gain(10)
                )


def on_ifeval(study: Study, prompts: Sequence[Prompt], seed: int) -> None:
    """A simulated writer on IFEval's prompts; the list of constraints is known and the critic is the official check."""
    world = SimWriter(prompts, Rates())
    for critic, (recall, alarm) in CRITICS.items():
        for name in ("decrim", "best-of-11"):
            chat = Chat(SimulatedChat(world, "sim:writer", seed))

            async def one(
                prompt: Prompt, name: str = name, chat: Chat = chat, r: float = recall, f: float = alarm
            ) -> Corrected:
                listed = [feature.statement for feature in prompt.features]
                judge = checker_as_critic(prompt, r, f, seed)
                if name == "decrim":
                    return await DeCRIM(decomposer=listed).asolve(chat, prompt.prompt, judge)
                return await BestOf().asolve(chat, prompt.prompt, judge, constraints=listed)

            answers = chat.map(one, prompts)
            add(study, name, prompts, answers, seed, part="ifeval", critic=critic)
            if name == "decrim" and critic == "oracle":
                first = [answer.rounds[0].text for answer in answers]
                right = [float(all(prompt.state(text))) for prompt, text in zip(prompts, first, strict=True)]
                study.add("one answer", "instruction_level", right, seed, part="ifeval")


def main() -> None:
    study = Study.start("decrim-study", "decrim", __doc__, items=700)
    warnings.filterwarnings("ignore", message="the decomposer found no constraints")  # a third of omissions leaves some bare
    prompts = study.ifeval()
    print(f"{len(prompts)} prompts of IFEval; rates: {asdict(Rates())}")
    for seed in range(study.arguments.seeds):
        tables(study, seed)
        stops_helping(study, seed)
        if prompts:
            on_ifeval(study, prompts, seed)
        study.write()


if __name__ == "__main__":
    main()
