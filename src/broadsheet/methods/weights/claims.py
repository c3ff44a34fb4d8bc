"""The checks behind the family's claims, see `core.verdicts`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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
    return graded(certain, likely), f"nats a token saved at {bits:.2f} bits: {', '.join(parts)}"


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
