"""One BitStack at many sizes against group quantisers, each at its own size; and what its parts are worth.

    python benchmarks/bitstack_study.py [--model pocket-2m] [--text FILE] [--sizes 32] [--seeds 3] [--sort ppl]

For every seed one stack is made and set to ``--sizes`` sizes between its smallest and its largest. Every rival, with groups
of 128 and 2, 3 or 4 bits, is compared with the stack set to the rival's size in bytes, all tensors of both models counted.
Variants without the activation-aware scaling, and with plain SVD instead of the decomposition of absolute values, are set
to six sizes of their own. ``--sort``: what orders the blocks, ppl (the paper's) or loss.
"""

from __future__ import annotations

from dataclasses import replace

from _weights import Study, command

from broadsheet.methods.weights.base import size
from broadsheet.methods.weights.bitstack import BitStack, set_size, size_table
from broadsheet.methods.weights.gptq import GPTQ
from broadsheet.methods.weights.hqq import HQQ
from broadsheet.methods.weights.rtn import RTN

RIVALS = {"rtn": RTN, "hqq": HQQ, "gptq": GPTQ}
VARIANTS = {"no scaling": {"scale": False}, "plain SVD": {"avd": False}}


def run(study: Study, method: BitStack, sizes: int, seed: int) -> None:
    stack = study.compressed(method, seed)
    steps = [step.bytes for step in size_table(stack)]
    for number in range(sizes):
        set_size(stack, steps[round(number * (len(steps) - 1) / (sizes - 1))])
        study.add("bitstack", seed, stack, study.scored(stack), part="curve")
    for name, rival in RIVALS.items():
        for bits in (2, 3, 4):
            other = study.compressed(rival(bits=bits, group_size=128), seed)
            set_size(stack, size(other).bytes)
            theirs, ours = study.scored(other), study.scored(stack)
            study.add(name, seed, other, theirs, part="rival", codes=bits)
            study.add("bitstack", seed, stack, ours, part="rival", codes=bits, against=name)
            study.saved("bitstack", seed, ours, theirs, against=name, codes=bits)
    for name, changes in VARIANTS.items():
        other = study.compressed(replace(method, **changes), seed)
        sizes_of = [step.bytes for step in size_table(other) if step.bytes >= steps[0]]  # what both can be set to
        for number in range(6):
            set_size(other, sizes_of[number * (len(sizes_of) - 1) // 5])
            set_size(stack, size(other).bytes)
            theirs, ours = study.scored(other), study.scored(stack)
            study.add(name, seed, other, theirs, part="variant", number=number)
            study.saved("bitstack", seed, ours, theirs, against=name, number=number)


def main() -> None:
    arguments = command(__doc__, sessions=4, sizes=32, levels=6, sort="ppl").parse_args()
    study = Study("bitstack-study", "bitstack", arguments)
    method = BitStack(n_iter=arguments.levels, k="auto", sort=arguments.sort, sort_samples=16)
    for seed in range(arguments.seeds):
        run(study, method, arguments.sizes, seed)
        study.finish()


if __name__ == "__main__":
    main()
