"""How few bits can a code model have? A study of quantisers on executable tasks (Giagnorio et al. 2025, arXiv 2503.07103).

`Study` crosses models, methods, precisions and calibration texts. Every arm completes the same tasks with the same random
numbers (`broadsheet.core.sampling`), completions are cut at the end of their function and run in a sandbox, and arms are
compared by pass or fail of the same sample of the same task. So the paper's questions are calls on its result:

    results = Study({"model": ["pocket-code"], "method": ["rtn", "gptq"], "precision": [8, 4, 3, 2],
                     "calibration": ["code", "mixed", "random"]}, tasks).run()
    results.compare("bf16")                          # RQ1: each precision against the 16-bit model
    results.compare({"calibration": "random"})       # RQ2: does calibrating on code help?
    results.compare({"method": "rtn"})               # which quantiser?
    results.compare({"model": "small"})              # RQ3: size

Deviations from the paper: any `WeightMethod` is a method, not AQLM alone; precisions are budgets and arms are labelled by
the bits a weight that they really store; samples share their noise between arms (the paper draws them independently, which
is as valid and less sharp); and because the samples of one task are no independent witnesses, a task-level test stands
beside McNemar's (section 3.6), and it is said where the two disagree.
"""

from .results import BASELINE, Arm, ArmResult, Comparison, Results
from .study import Study

__all__ = ["BASELINE", "Arm", "ArmResult", "Comparison", "Results", "Study"]
