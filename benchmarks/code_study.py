"""How few bits can pocket-code have, and does calibrating on code help? Any methods of the weights family, three seeds.

    python benchmarks/code_study.py [--methods rtn,hqq,gptq] [--bits 8,4,3,2] [--seeds 3] [--tasks 200] [--samples 20]
        [--exact aqlm:num_codebooks=3,nbits_per_codebook=6,in_group_size=4]

``--exact`` (may be repeated) takes a method with these parameters instead of fitting it to bits. Every seed draws other
completions and another calibration set; calibrated methods are calibrated on code, mixed and random text. Arms that were
measured before are kept under BROADSHEET_HOME.

Written are, for every arm and seed, pass@1, true bits, bytes and perplexities, and the differences between each arm and the
16-bit model, between calibrations and between methods, with both tests.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from broadsheet.core.microworld.code import CALIBRATIONS, make_tasks
from broadsheet.core.records import Record, write_results
from broadsheet.lab.code_study import picture, tables
from broadsheet.lab.plots import svg
from broadsheet.methods.weights.base import WeightMethod
from broadsheet.methods.weights.quantizing_code_llms import Arm, Results, Study
from broadsheet.methods.weights.quantizing_code_llms.study import named

RESULTS = Path(__file__).parent / "results" / "code_study.records.json"
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def exact(text: str) -> tuple[str, WeightMethod]:
    """A method with parameters: ``name:field=value,field=value``."""
    name, _, rest = text.rpartition(":") if "=" in text else (text, "", "")
    parameters: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        field, _, value = part.partition("=")
        parameters[field] = int(value) if value.isdigit() else float(value) if "." in value else value
    return text, replace(named(name)[1], **parameters)


def records_of(results: Results) -> list[Record]:
    """The arms and the differences between them."""
    found = results.records()
    for question, comparisons in (
        ("precision", results.compare("bf16")),
        ("calibration", results.pairwise("calibration")),
        ("method", results.pairwise("method")),
    ):
        found += results.comparison_records(comparisons, question)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-code")
    parser.add_argument("--methods", default="rtn,hqq,gptq")
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--calibration", default=",".join(CALIBRATIONS))
    parser.add_argument("--exact", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tasks = make_tasks(arguments.tasks)
    methods = dict(named(name) for name in arguments.methods.split(",") if name)
    designs: list[dict[str, Any]] = [{"method": methods, "precision": list(map(float, arguments.bits.split(",")))}]
    if arguments.exact:
        designs.append({"method": dict(map(exact, arguments.exact)), "precision": [None]})
    console, records = Console(width=170), []

    def progress(arm: Arm, done: int, of: int, number: int, total: int) -> None:
        if done == of:
            console.print(f"{number + 1}/{total} {arm.label}", highlight=False)

    for seed in range(arguments.seeds):
        parts = []
        for design in designs:
            factors = {"model": [arguments.model], "calibration": arguments.calibration.split(","), **design}
            parts.append(
                Study(factors, tasks, n_samples=arguments.samples, max_new_tokens=96, seed=seed).run(progress=progress)
            )
        known = {arm.arm: arm for part in parts for arm in part.arms}  # the baseline is in all of them
        results = replace(parts[0], arms=tuple(known.values()))
        console.rule(f"seed {seed}")
        for table in tables(results):
            console.print(table)
        records += records_of(results)
        if not arguments.dry:
            write_results(records, RESULTS)
            if seed == 0:
                (IMAGES / "code_study.svg").write_text(svg(picture(results, "python")), encoding="utf-8")


if __name__ == "__main__":
    main()
