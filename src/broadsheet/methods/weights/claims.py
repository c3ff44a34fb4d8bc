"""The checks behind the family's claims, see `core.verdicts`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import pstdev

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded, mean, percent

# --- BitStack: one stack at the rivals' sizes, on the built-in model -----------------------------------------------------


def _regime(records: Sequence[Record], codes: int, against: Sequence[str], wins: bool = True) -> Verdict:
    """Nats a token that BitStack saves over each rival at the rival's bytes, one value a seed."""
    found = find(records, bench="bitstack-study", method="bitstack", metric="loss_saved", codes=codes)
    found = [record for record in found if record.model.startswith("pocket") and record.setting["against"] in against]
    if not found:
        return None
    sign = 1 if wins else -1
    parts, certain, likely = [], [], []
    for name in against:
        some = [record for record in found if record.setting["against"] == name]
        saved = mean([record.value for record in some]) or 0.0
        parts.append(f"{saved:+.3f} over {name}")
        certain.append(all(record.ci and min(sign * bound for bound in record.ci) > 0 for record in some))
        likely.append(sign * saved > 0)
    bits = mean(
        [r.setting["bits"] for r in find(records, bench="bitstack-study", part="rival", codes=codes) if "bits" in r.setting]
    )
    return graded(certain, likely), f"nats a token saved at {bits:.2f} bits: {', '.join(parts)}{_matrices(records, codes)}"


def _matrices(records: Sequence[Record], codes: int) -> str:
    """What is lost of wide matrices alone: in narrow ones, as small models have, factors cost a good part of a bit."""
    found = find(records, bench="bitstack-regions", matrix="gaussian", bits=codes + 0.25)
    widest = max((record.setting["size"] for record in found), default=0)
    errors = {record.method: record.value for record in found if record.setting["size"] == widest}
    if not errors:
        return ""
    others = min(errors["rtn"], errors["hqq"])
    return f"; error of a matrix of {widest} x {widest}: {errors['bitstack']:.2f} against {others:.2f}"


def bitstack_two_bits(records: Sequence[Record]) -> Verdict:
    """Less loss than round-to-nearest and HQQ at the bytes of their 2-bit models; GPTQ is shown too."""
    judged, shown = _regime(records, 2, ("rtn", "hqq")), _regime(records, 2, ("rtn", "hqq", "gptq"))
    return judged and shown and (judged[0], shown[1])


def bitstack_three_bits(records: Sequence[Record]) -> Verdict:
    """Less loss than all three at 3 bits."""
    return _regime(records, 3, ("rtn", "hqq", "gptq"))


def bitstack_four_bits(records: Sequence[Record]) -> Verdict:
    """More loss than all three at 4 bits, as the paper says."""
    return _regime(records, 4, ("rtn", "hqq", "gptq"), wins=False)


def bitstack_parts(records: Sequence[Record]) -> Verdict:
    """Plain SVD and no scaling lose at every size."""
    found = find(records, bench="bitstack-study", method="bitstack", metric="loss_saved")
    found = [record for record in found if "number" in record.setting and record.model.startswith("pocket")]
    if not found:
        return None
    parts, certain, likely = [], [], []
    for name in ("plain SVD", "no scaling"):
        some = [record for record in found if record.setting["against"] == name]
        won = sum(record.value > 0 for record in some)
        parts.append(f"{won} of {len(some)} sizes won over {name} (mean {mean([r.value for r in some]):+.3f} nats)")
        certain.append(won == len(some))
        likely.append((mean([record.value for record in some]) or 0.0) > 0)
    return graded(certain, likely), "; ".join(parts)


# --- DFloat11 -----------------------------------------------------------------------------------------------------------


def _decode(records: Sequence[Record], metric: str, method: str = "DFloat11", **setting: object) -> list[Record]:
    return find(records, bench="dfloat11-decode", method=method, metric=metric, **setting)


def dfloat11_lossless(records: Sequence[Record]) -> Verdict:
    """Logits that differ after compressing; weights are compared whenever a model is compressed."""
    found = _decode(records, "differing_logits")
    if not found:
        return None
    differing = sum(int(record.value) for record in found)
    return graded([differing == 0], []), f"{differing} {found[0].unit} logits differ ({found[0].setting['tokens']} tokens)"


def dfloat11_size(records: Sequence[Record]) -> Verdict:
    """Bits a Gaussian weight, 10.79, and the share of the built-in model's blocks."""
    gaussian, model = _decode(records, "bits", unit="gaussian"), [r for r in _decode(records, "ratio") if r.model]
    entropy = _decode(records, "entropy", unit="gaussian")
    if not gaussian or not model or not entropy:
        return None
    bits = gaussian[0].value
    text = f"{bits:.2f} bits of a Gaussian weight ({bits / 16:.1%}), {model[0].value:.1%} of the built-in model's layers"
    return graded([abs(bits - 10.79) <= 0.02, bits >= 8 + entropy[0].value], [bits < 11.5]), text


def dfloat11_entropy(records: Sequence[Record]) -> Verdict:
    """Entropy and number of exponents of a trained model's blocks."""
    entropy, used = ([r for r in _decode(records, metric) if r.model] for metric in ("entropy", "exponents"))
    if not entropy or not used:
        return None
    bits, values = mean([r.value for r in entropy]) or 0.0, mean([r.value for r in used]) or 0.0
    return graded([abs(bits - 2.6) <= 0.2, values <= 45], [bits < 3.5]), f"{bits:.2f} bits, {values:.0f} values"


def dfloat11_batches(records: Sequence[Record]) -> Verdict:
    """The slowdown at batch 1, 8 and 64 on a CPU: it must fall."""
    found = sorted(_decode(records, "slowdown"), key=lambda record: record.setting["batch"])
    if not found:
        return None
    values = [record.value for record in found]
    text = ", ".join(f"{record.value:.2f}× at batch {record.setting['batch']}" for record in found)
    falls = all(a > b for a, b in pairwise(values))
    apart = all(a.setting["least"] > b.setting["most"] for a, b in pairwise(found))
    return graded([falls, apart], [falls]), text


def dfloat11_context(records: Sequence[Record]) -> Verdict:
    """More tokens than the 16-bit model's in the same memory, by arithmetic and in limited processes; the paper's ratios are
    seen where memory is little more than the model."""
    found = sorted(
        find(records, bench="dfloat11-context", metric="context_ratio"), key=lambda record: record.setting["room"]
    )
    runs = [record for record in found if record.setting["how"] == "real run"]
    if not runs:
        return None
    sums = {record.setting["room"]: record.value for record in found if record.setting["how"] == "arithmetic"}
    text = ", ".join(f"{r.value:.1f}× ({sums[r.setting['room']]:.1f}× by arithmetic) at {r.setting['room']:g}" for r in runs)
    longer = all(record.value > 1 for record in found)
    return graded([longer, runs[0].value >= 5.3], [longer]), f"{text} times the 16-bit model's bytes, workspace counted"


# --- OliVe --------------------------------------------------------------------------------------------------------------


def _accuracy(records: Sequence[Record], method: str, outliers: str) -> float | None:
    found = find(records, bench="olive-study", method=method, metric="accuracy", outliers=outliers)
    return mean([record.value for record in found])


def olive_four_bits(records: Sequence[Record]) -> Verdict:
    """Points of accuracy lost at W4A4 with outliers put in, against clipped int4; and without outliers."""
    lost: dict[str, tuple[float, float]] = {}
    for outliers in ("alone", "none"):
        full, pairs, clipped = (_accuracy(records, name, outliers) for name in ("bf16", "olive", "clipped int4"))
        if full is None or pairs is None or clipped is None:
            return None
        lost[outliers] = (100 * (full - pairs), 100 * (full - clipped))
    (pairs, clipped), (plain_pairs, plain_clipped) = lost["alone"], lost["none"]
    text = (
        f"{pairs:.1f} points lost against {clipped:.1f} with outliers, {plain_pairs:.1f} against {plain_clipped:.1f} without"
    )
    return graded([clipped >= 3 * pairs, abs(plain_pairs - plain_clipped) <= 5], [clipped > pairs]), text


def olive_pairs(records: Sequence[Record]) -> Verdict:
    """The share of pairs that lose an outlier: Gaussian values, and the weights of the built-in model."""
    found = find(records, bench="olive-study", metric="lost_pairs")
    if not found:
        return None
    gaussian = [record.value for record in found if record.setting["tensor"] == "gaussian"]
    weights = [record.value for record in found if record.setting["tensor"] != "gaussian"]
    worst = max(weights)
    text = f"{gaussian[0]:.3%} of Gaussian pairs, {mean(weights):.3%} of the model's (worst layer {worst:.3%})"
    return graded([worst < 0.01, gaussian[0] < 0.01], [(mean(weights) or 0) < 0.01]), text


# --- quantised code models --------------------------------------------------------------------------------------------


def _differences(records: Sequence[Record], question: str, budget: float, **setting: object) -> list[Record]:
    """Differences of pass@1 that the study measured at a precision, one a seed: AQLM's, or GPTQ's where it was not run."""
    found = find(records, bench="code-study", metric="pass@1_difference", question=question, budget=budget, **setting)
    return [record for record in found if record.method == "aqlm"] or [r for r in found if r.method == "gptq"]


def _significant(found: Sequence[Record]) -> list[bool]:
    """By the task-level test, a seed each."""
    return [record.setting["p_tasks"] < 0.05 for record in found]


def code_four_bits(records: Sequence[Record]) -> Verdict:
    """Four bits lose at most a point, and not significantly on any seed."""
    found = _differences(records, "precision", 4.0, calibration="code")
    if not found:
        return None
    lost, bits = mean([record.value for record in found]) or 0.0, found[0].setting["bits"]
    same = not any(_significant(found))
    text = f"{found[0].method} at {bits:.2f} bits: {100 * lost:+.1f} points over {len(found)} seeds, "
    return graded([same, lost >= -0.01], [same]), text + f"{percent(1 - bits / 16)} less in the linear layers"


def code_bits(records: Sequence[Record]) -> Verdict:
    """A knee between 4 and 3 bits: the former loses nothing significant on any seed, the latter and 2 bits do on all."""
    found = {budget: _differences(records, "precision", budget, calibration="code") for budget in (8.0, 4.0, 3.0, 2.0)}
    if not all(found.values()):
        return None
    means = {budget: mean([record.value for record in some]) or 0.0 for budget, some in found.items()}
    falls = all(means[a] >= means[b] - 0.01 for a, b in pairwise(means))
    kept = not any(_significant(found[8.0]) + _significant(found[4.0]))
    parts = ", ".join(f"{100 * value:+.1f} at {found[b][0].setting['bits']:.2f}" for b, value in means.items())
    certain = [falls, kept, all(_significant(found[3.0])), all(_significant(found[2.0]))]
    text = f"{found[4.0][0].method}, points against bf16 by true bits: {parts}"
    return graded(certain, [falls, kept, all(_significant(found[2.0]))]), text


def code_sizes(records: Sequence[Record]) -> Verdict:
    """Sizes in the official layout are within half a percent of those in the paper; packed without gaps, they are shown."""
    paper = {16: 13.5, 8: 7.48, 4: 4.00, 3: 3.80, 2: 2.27}
    found = find(records, bench="aqlm-sizes", metric="bytes")
    held = {(r.setting["called"], r.setting["layout"]): r.value / 1e9 for r in found}
    if not held:
        return None
    certain = [abs(held[called, "official"] / wanted - 1) < 0.005 for called, wanted in paper.items()]
    likely = [abs(held[called, "official"] / wanted - 1) < 0.05 for called, wanted in paper.items()]
    official, packed = (" / ".join(f"{held[c, layout]:.2f}" for c in paper) for layout in ("official", "packed"))
    return graded(certain, likely), f"{official} GB with codes in whole bytes as the paper has them; packed {packed}"


def code_calibration(records: Sequence[Record]) -> Verdict:
    """Code beats random text at 2 bits on every seed, and makes no difference at 4 and 8."""
    against: dict[float, list[Record]] = {budget: [] for budget in (8.0, 4.0, 3.0, 2.0)}
    for budget, kept in against.items():
        found = _differences(records, "calibration", budget, calibration="random")
        kept += [record for record in found if record.setting["against"]["calibration"] == "code"]
    if not (against[2.0] and against[4.0]):
        return None
    gains = {budget: -(mean([r.value for r in some]) or 0.0) for budget, some in against.items() if some}
    wins = [record.value < 0 and record.setting["p_tasks"] < 0.05 for record in against[2.0]]
    same = not any(_significant(against[4.0]) + _significant(against[8.0]))
    parts = ", ".join(f"{100 * gain:+.1f} at {budget:g} bits" for budget, gain in gains.items())
    text = f"{against[2.0][0].method}, points that code gains over random text: {parts}; "
    text += f"{sum(wins)} of {len(wins)} seeds won at 2 bits"
    return graded([all(wins), same], [gains[2.0] > 0]), text


# --- OutlierTune --------------------------------------------------------------------------------------------------------


def _study(records: Sequence[Record], method: str, metric: str, outliers: str, codes: int) -> float | None:
    found = find(records, bench="outliertune-study", method=method, metric=metric, outliers=outliers, codes=codes)
    return mean([record.value for record in found])


def outliertune_parity(records: Sequence[Record]) -> Verdict:
    """Points of accuracy and KL lost at 6 and 8 bits where outlier channels are shifted."""
    full = mean([r.value for r in find(records, bench="outliertune-study", method="bf16", metric="accuracy")])
    found = {bits: _study(records, "outliertune", "accuracy", "shifted", bits) for bits in (8, 6)}
    eight, six = found[8], found[6]
    if full is None or eight is None or six is None:
        return None
    lost = {8: 100 * (full - eight), 6: 100 * (full - six)}
    text = f"{lost[8]:.1f} points lost at 8 bits, {lost[6]:.1f} at 6"
    return graded([lost[8] <= 1, lost[6] <= 1], [lost[8] <= 1]), text


def outliertune_memory(records: Sequence[Record]) -> Verdict:
    """Integer weights and their scales, and whole blocks, over the 16-bit model's."""
    found = find(records, bench="outliertune-study", metric="block_bytes", codes=8)
    if not found:
        return None
    stored, blocks = found[0].setting["stored"], max(record.value for record in found)
    return graded([stored <= 0.52], [blocks < 0.55]), f"{stored:.3f} (with norms and biases {blocks:.3f})"


def outliertune_ranking(records: Sequence[Record]) -> Verdict:
    """KL over SmoothQuant's at 6 bits on all tokens of a text, with outliers of every kind."""
    ratios = {}
    for outliers in ("shifted", "scaled", "none"):
        ours, theirs = (_study(records, name, "text_kl", outliers, 6) for name in ("outliertune", "smoothquant"))
        if ours is None or theirs is None:
            return None
        ratios[outliers] = ours / theirs
    text = ", ".join(f"{ratio:.2f}× ({outliers})" for outliers, ratio in ratios.items())
    holds = [ratios["shifted"] <= 0.5, ratios["scaled"] <= 0.5]
    return graded(holds, [ratios["shifted"] < 1]), f"SmoothQuant's KL times {text}"


def outliertune_centring(records: Sequence[Record]) -> Verdict:
    """KL at 6 bits on all tokens of a text where outlier channels are shifted, with and without centring."""
    wanted = {"bench": "outliertune-study", "metric": "text_kl", "outliers": "shifted", "codes": 6}
    ours, theirs = (find(records, method=name, **wanted) for name in ("outliertune", "no symmetrisation"))
    if not ours or not theirs:
        return None
    with_, without = mean([record.value for record in ours]) or 0.0, mean([record.value for record in theirs]) or 0.0
    apart = max(r.ci[1] if r.ci else r.value for r in ours) < min(r.ci[0] if r.ci else r.value for r in theirs)
    return graded([apart], [with_ < without]), f"KL {with_:.4f} against {without:.4f} nats a token"


# --- AccLLM: its ladder, on the built-in model and on a trained one's text ------------------------------------------------


def accllm_accuracy(records: Sequence[Record]) -> Verdict:
    """Whether the last rung follows instructions as the original does; with it, what learned ranges and the window do."""
    found = find(records, bench="accllm_ladder")

    def of(metric: str, label: str, **setting: str) -> list[Record]:
        return find(found, metric=metric, method=label, **setting)

    before, after = of("instructions", "FP"), of("instructions", "+W2")
    far = of("recall", "+Lambda", windows_back="2 to 3")
    rounded, learned = (of("perplexity", f"2:4 W2 {name}", part="weights") for name in ("nearest", "learned"))
    if not (before and after and far and rounded and learned):
        return None
    ratios = {a.model.split("@")[0]: a.value / b.value for a, b in zip(rounded, learned, strict=True) if a.model == b.model}
    text = (
        f"instructions {percent(before[0].value)} before, {percent(after[0].value)} after; two windows back "
        f"{percent(far[0].value)} of pairs recalled; perplexity of rounding to nearest over that of learned ranges "
        + ", ".join(f"{ratio:.1f} ({model})" for model, ratio in ratios.items())
    )
    kept = after[0].value >= (before[0].ci or (1, 1))[0]
    return graded([kept, max(ratios.values()) >= 2, far[0].value < 0.05], [after[0].value >= 0.9 * before[0].value]), text


# --- CRaSh --------------------------------------------------------------------------------------------------------------


#: accuracy by (task, seed)
Scores = dict[tuple[str, int], float]


def _plugged(records: Sequence[Record], method: str, system: str = "plug-in", **setting: object) -> Scores:
    """Accuracy by task and seed."""
    found = find(records, bench="crash-study", method=method, metric="accuracy", system=system, **setting)
    return {(record.setting["task"], record.seed): record.value for record in found}


def _gains(ours: Scores, theirs: Scores) -> list[float]:
    """Points gained, by task and seed."""
    return [100 * (value - theirs[key]) for key, value in ours.items() if key in theirs]


def crash_plug_in(records: Sequence[Record]) -> Verdict:
    """CRaSh above uniform dropping and the distilled emulator; and where it stands among random sets."""
    crash, uniform, distilled = (_plugged(records, name) for name in ("crash", "uniform", "distilled"))
    over = _gains(crash, uniform)
    if not over:
        return None
    drawn = find(records, bench="crash-study", metric="accuracy", system="plug-in", seed=0)
    drawn = [record for record in drawn if record.method.startswith("random ")]
    means = {"CRaSh": crash, "uniform": uniform, "distilled": distilled}
    text = ", ".join(f"{percent(mean(list(values.values())) or 0.0)} {name}" for name, values in means.items())
    median = True
    if drawn:
        task = drawn[0].setting["task"]
        beaten = sum(crash[task, 0] > record.value for record in drawn)
        median = beaten >= len(drawn) / 2
        text += f"; above {beaten} of {len(drawn)} random sets on {task}"
    spread = pstdev(over) if len(over) > 1 else 0.0
    average = mean(over) or 0.0
    return graded([average >= spread, average > 0, median], [average > 0]), text


def crash_sharing(records: Sequence[Record]) -> Verdict:
    """Plug-in accuracy with and without sharing."""
    gains = _gains(_plugged(records, "crash"), _plugged(records, "crash, no sharing"))
    if not gains:
        return None
    won = sum(gain > 0 for gain in gains)
    text = f"{mean(gains):+.1f} points, {won} of {len(gains)} tasks and seeds won"
    return graded([won == len(gains)], [(mean(gains) or 0.0) > 0]), text


def crash_emulator(records: Sequence[Record]) -> Verdict:
    """The plug-in model above the tuned emulator and above the full model as it was."""
    plugged = _plugged(records, "crash")
    over_emulator = _gains(plugged, _plugged(records, "crash", "emulator tuned"))
    over_full = _gains(plugged, _plugged(records, "full", "zero-shot"))
    if not over_emulator or not over_full:
        return None
    text = f"{mean(over_emulator):+.1f} points over the tuned emulator, {mean(over_full):+.1f} over the model before tuning"
    averages = [(mean(over_emulator) or 0.0) > 0, (mean(over_full) or 0.0) > 0]
    return graded([min(over_emulator) > 0, min(over_full) > 0], averages), text


def crash_line(records: Sequence[Record]) -> Verdict:
    """The barrier between the tuned full model and the plugged-in one, over the gap that tuning closes."""
    found = [record.value for record in find(records, bench="crash-study", metric="barrier")]
    if not found:
        return None
    text = f"{percent(mean(found) or 0.0)} of the gap, at most {percent(max(found))}"
    return graded([max(found) <= 0.05], [(mean(found) or 0.0) <= 0.05]), text
