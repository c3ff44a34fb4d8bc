"""INSTINCT (Lin et al., ICML 2024, arXiv 2310.02905): finds the instruction that a black box follows best.

An open model (the white box) writes candidate instructions from a few examples, steered by random soft prompts (`space`). A
neural bandit predicts from the white box's hidden state what an instruction is worth and which one to try next (`bandit`).
Every try is paid for: the black box answers 20 validation examples (`scoring`). `rivals` spend the same budget.

    found = INSTINCT().solve(chat, load_task(folder, "antonyms"), model, tokenizer)
    found.best, found.searched, found.rescored

The best of 165 noisy scores is too good to be true. So the best few are scored again on fresh samples, the choice is made on
all of that, and the chosen one is scored once more on samples that had no part in the choice: `Result.optimism` is the
difference to what the search believed.

Deviations from the authors' code: weights are scaled by the number of inputs (``init="unit"`` is theirs, and a random
search), the first choice is made by a trained network, the initial points may be the best.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from broadsheet.core.chat import Chat

from .bandit import NeuralUCB
from .rivals import Evolution, GaussianProcess, Random
from .scoring import Example, Scorer, Task, load_task, own_task, score_of
from .space import InstructionSpace, Pooling

__all__ = [
    "INSTINCT",
    "Example",
    "InstructionSpace",
    "NeuralUCB",
    "Result",
    "Scorer",
    "Task",
    "load_task",
    "optimise",
    "own_task",
    "score_of",
]

Array = NDArray[np.float64]
RIVALS = ("random", "gp", "gp_z", "evolution", "neural", "neural_z", "neural_unit", "neural_unique")


class _Surrogate(Protocol):
    def observe(self, x: Array, reward: float) -> None: ...
    def update(self, x: Array, reward: float) -> None: ...
    def rank(self, x: Array) -> Array: ...


@dataclass(frozen=True)
class Try:
    """One evaluation: the point of the space (None for a text that was bred), its instruction, what it scored; ``cached``:
    the text had been scored before, which counts as a round and costs nothing; ``initial``: drawn, not chosen."""

    point: int | None
    text: str
    reward: float
    cached: bool
    initial: bool


@dataclass(frozen=True)
class Row:
    """One method's run. ``rescored`` is the chosen instruction's score on samples that had no part in the choice, and
    ``optimism`` what the search believed above that; ``paid`` texts were scored during the search."""

    method: str
    best: str
    searched: float
    rescored: float
    mean_reward: float
    paid: int
    hits: int
    history: tuple[Try, ...]

    @property
    def optimism(self) -> float:
        return self.searched - self.rescored

    @property
    def curve(self) -> list[float]:
        """The best score so far after every round."""
        return np.maximum.accumulate([one.reward for one in self.history]).tolist()


@dataclass(frozen=True)
class Result:
    """What was found. ``best``: the instruction; ``searched``: its score during the search; ``rescored``: on fresh samples.
    ``signal``: False when every instruction scored the same. ``table``: a row a method, INSTINCT's first. ``tested``:
    the score on the task's test examples, from `INSTINCT.solve`."""

    table: tuple[Row, ...]
    tested: float | None = None

    best = property(lambda self: self.table[0].best)
    searched = property(lambda self: self.table[0].searched)
    rescored = property(lambda self: self.table[0].rescored)
    optimism = property(lambda self: self.table[0].optimism)
    history = property(lambda self: self.table[0].history)

    @property
    def signal(self) -> bool:
        return len({one.reward for one in self.history}) > 1

    def __str__(self) -> str:
        lines = [f"{'method':<14} {'mean':>6} {'search':>7} {'fresh':>6} {'optimism':>9} {'paid':>5} {'hits':>5}"]
        for row in self.table:
            lines.append(
                f"{row.method:<14} {row.mean_reward:>6.3f} {row.searched:>7.3f} {row.rescored:>6.3f} {row.optimism:>+9.3f} "
                f"{row.paid:>5} {row.hits:>5}"
            )
        lines.append(f"best: {self.best}" if self.signal else "no signal: every instruction scored the same")
        return "\n".join(lines)


@dataclass(frozen=True)
class INSTINCT:
    """The paper's hyperparameters (section 5; the authors' script).

    Space: ``n_domain`` points in ``d`` dimensions, ``n_tok`` soft tokens, ``pooling`` of the hidden states. Search:
    ``budget`` rounds, the first ``n_init`` random; each later one looks at ``n_eval`` random points. Bandit: see
    `NeuralUCB`; ``features``: "x", hidden states, or "z", the points themselves (the ablation). ``unique_text``: passes
    over points whose instruction has been scored; else such a round is spent on what is known, as in the authors' code.
    ``recheck``: how many of the best are scored again before one is chosen. The paper's ``nu`` of 1 explores much; with the
    scaled network 0.1 and 0.01 earned more in the simulated worlds of the study.

    Raises ValueError for settings out of range.
    """

    n_domain: int = 10_000
    d: int = 10
    n_tok: int = 5
    pooling: Pooling = "last"
    budget: int = 165
    n_init: int = 40
    n_eval: int = 1000
    hidden: int = 100
    lam: float = 0.1
    nu: float = 1.0
    init: Literal["scaled", "unit"] = "scaled"
    style: Literal["ucb", "ts"] = "ucb"
    steps: int = 1000
    lr: float = 1e-3
    features: Literal["x", "z"] = "x"
    unique_text: bool = False
    recheck: int = 5

    def __post_init__(self) -> None:
        if self.n_init < 2 or self.budget < self.n_init:
            raise ValueError(f"the budget covers at least 2 initial points, got {self.budget} for {self.n_init}")
        if self.d < 1:
            raise ValueError(f"d is at least 1, got {self.d}")
        if not 1 <= self.n_eval <= self.n_domain or self.n_init > self.n_domain:
            raise ValueError(f"n_eval and n_init are at most n_domain; got {self.n_eval}, {self.n_init} and {self.n_domain}")
        if self.features not in ("x", "z") or self.recheck < 1:
            raise ValueError(f"features are x or z, recheck is at least 1; got {self.features}, {self.recheck}")
        self._bandit(1, 0)

    def optimise(
        self,
        space: InstructionSpace,
        scorer: Callable[[str], float],
        seed: int = 0,
        rivals: Sequence[str] = (),
        breed: Callable[[str, str, np.random.Generator], str] | None = None,
        tick: Callable[[str, int, int], None] | None = None,
    ) -> Result:
        """Searches ``space`` for the instruction that ``scorer`` likes best.

        ``scorer``: instruction -> score; where it has ``fresh(text, number)`` (as `Scorer` has) scores are checked on fresh
        samples, else it is simply asked again. ``rivals``: of `RIVALS`, run with the same initial points, candidates and
        budget. ``breed``: how "evolution" crosses texts. ``tick(method, done, rounds)`` is called after every round.
        Raises ValueError for a score that is no number; warns when all scores are the same.
        """
        if self.n_eval > len(space) or self.n_init > len(space):
            raise ValueError(f"n_eval {self.n_eval} and n_init {self.n_init} must fit into a space of {len(space)} points")
        for rival in rivals:
            if rival not in RIVALS:
                raise ValueError(f"no rival '{rival}'; there are {', '.join(RIVALS)}")
        rows = []
        for name in ("instinct", *rivals):
            method, kind = self._variant(name)
            rows.append(method._run(name, kind, space, scorer, seed, breed, tick))
        result = Result(tuple(rows))
        if not result.signal:
            warnings.warn("no signal: every instruction scored the same", stacklevel=2)
        return result

    def solve(
        self,
        chat: Chat,
        task: Task,
        model: Any,
        tokenizer: Any,
        seed: int = 0,
        rivals: Sequence[str] = (),
        tick: Callable[[str, int, int], None] | None = None,
        **scoring: Any,
    ) -> Result:
        """The instruction for a task: ``chat`` is the black box, ``model`` and ``tokenizer`` the white box.

        Half of the training examples (at most 100) are there to show 5 of, the rest to score on; ``scoring`` goes to
        `Scorer`. The result is tested on up to 100 of the task's test examples.
        """
        examples = list(task.train)
        random.Random(seed).shuffle(examples)
        shown = min(len(examples) // 2, 100)
        if shown < 1:
            raise ValueError(f"task {task.name} has {len(examples)} training examples; 2 are needed")
        demos = [(example.input, example.outputs[0]) for example in examples[:shown][:5]]
        scorer = Scorer(chat, tuple(examples[shown:]), **{"metric": task.metric, "seed": seed, **scoring})
        space = self.space(model, tokenizer, demos)
        found = self.optimise(space, scorer, seed, rivals, tick=tick)
        return replace(found, tested=scorer.on(found.best, task.test[:100]))

    def space(self, model: Any, tokenizer: Any, demos: Sequence[tuple[str, str]]) -> InstructionSpace:
        """The space of a white box and examples."""
        return InstructionSpace.from_model(model, tokenizer, demos, self.n_domain, self.d, self.n_tok, self.pooling)

    def _variant(self, name: str) -> tuple[INSTINCT, str]:
        """The settings and the kind of surrogate of a method by name."""
        if name in ("instinct", "random", "evolution"):
            return self, "neural" if name == "instinct" else name
        kind, _, which = name.partition("_")
        if which == "unit":
            return replace(self, init="unit", nu=1.0, features="x"), kind
        if which == "unique":
            return replace(self, unique_text=True), kind
        return replace(self, features=which or "x"), kind  # type: ignore[arg-type]

    def _bandit(self, dim: int, seed: int) -> NeuralUCB:
        return NeuralUCB(dim, self.hidden, self.lam, self.nu, self.init, self.style, self.steps, self.lr, seed)

    def _run(
        self,
        name: str,
        kind: str,
        space: InstructionSpace,
        scorer: Callable[[str], float],
        seed: int,
        breed: Callable[[str, str, np.random.Generator], str] | None,
        tick: Callable[[str, int, int], None] | None,
    ) -> Row:
        score, history = _Scores(scorer), list[Try]()

        def spend(point: int | None, text: str, initial: bool = False) -> float:
            cached = text in score.known
            history.append(Try(point, text, score(text), cached, initial))
            if tick:
                tick(name, len(history), self.budget)
            return history[-1].reward

        draw = np.random.default_rng(seed)
        first = draw.choice(len(space), self.n_init, replace=False)
        rewards = [spend(int(point), space.decode(int(point)), initial=True) for point in first]
        if kind == "evolution":
            pool = Evolution(breed, seed=seed)
            for point, reward in zip(first, rewards, strict=True):
                pool.observe(space.decode(int(point)), reward)
            for _ in range(self.budget - self.n_init):
                text = pool.child()
                pool.observe(text, spend(None, text))
        else:
            features = space.features if self.features == "x" else space.z
            surrogate = self._surrogate(kind, features.shape[1], seed)
            for point, reward in zip(first, rewards, strict=True):
                surrogate.observe(features[point], reward)
            for _ in range(self.budget - self.n_init):
                looked = np.arange(len(space))
                if self.n_eval < len(space):
                    looked = draw.choice(len(space), self.n_eval, replace=False)
                point = self._pick(looked[np.argsort(-surrogate.rank(features[looked]), kind="stable")], space, score.known)
                surrogate.update(features[point], spend(point, space.decode(point)))
        chosen, rescored = score.choose(self.recheck)
        later = [one.reward for one in history if not one.initial] or rewards
        hits = sum(one.cached for one in history)
        return Row(
            name, chosen, score.known[chosen], rescored, float(np.mean(later)), len(score.known), hits, tuple(history)
        )

    def _surrogate(self, kind: str, dim: int, seed: int) -> _Surrogate:
        if kind == "random":
            return Random(seed)
        return GaussianProcess(self.features == "x") if kind == "gp" else self._bandit(dim, seed)

    def _pick(self, ranked: NDArray[np.int64], space: InstructionSpace, known: dict[str, float]) -> int:
        """The best point, or with ``unique_text`` the best whose text is new (of the first 50: texts cost a generation)."""
        if self.unique_text:
            for point in ranked[:50]:
                if space.decode(int(point)) not in known:
                    return int(point)
        return int(ranked[0])


class _Scores:
    """What the search paid for: one score a text."""

    def __init__(self, scorer: Callable[[str], float]):
        self.scorer, self.known = scorer, dict[str, float]()
        self.fresh: Callable[[str, int], float] = getattr(scorer, "fresh", lambda text, number: scorer(text))

    def __call__(self, text: str) -> float:
        if text not in self.known:
            self.known[text] = _finite(self.scorer(text), text)
        return self.known[text]

    def choose(self, recheck: int) -> tuple[str, float]:
        """The best by the mean of the search's score and a fresh one, among the ``recheck`` best; and its score on a third
        draw, which had no part in the choice."""
        top = sorted(self.known, key=self.known.__getitem__, reverse=True)[:recheck]
        best = max(top, key=lambda text: self.known[text] + _finite(self.fresh(text, 1), text))
        return best, _finite(self.fresh(best, 2), best)


def _finite(score: float, text: str) -> float:
    if not np.isfinite(score):
        raise ValueError(f"the scorer gave {score} for '{text[:60]}': scores must be finite numbers")
    return float(score)


def optimise(
    space: InstructionSpace,
    scorer: Callable[[str], float] | tuple[Chat, Sequence[Example], Any],
    budget: int = 165,
    n_init: int = 40,
    n_eval: int = 1000,
    seed: int = 0,
    rivals: Sequence[str] = ("random", "gp"),
    **settings: Any,
) -> Result:
    """`INSTINCT.optimise` over a space that is there; ``scorer`` may also be (chat, examples, metric)."""
    if isinstance(scorer, tuple):
        chat, examples, metric = scorer
        scorer = Scorer(chat, tuple(examples), metric, seed=seed)
    sizes: dict[str, Any] = {"n_domain": len(space), "budget": budget, "n_init": n_init, "n_eval": n_eval}
    return INSTINCT(**sizes, **settings).optimise(space, scorer, seed, rivals)
