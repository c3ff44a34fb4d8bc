"""VIF-RAG and FollowRAG: verified instruction-following data for retrieval-augmented generation, and its benchmark (Dong et
al., AAAI 2025, arXiv 2410.09584).

`FollowRAG` is the benchmark; `VIFRAG` makes data with a model, verifiers and a judge. Tuning on it belongs elsewhere.
"""

from .followrag import CHECKERS, FollowRAG, Item, alias_match, contradictory, load_followrag, read_rating
from .synthesis import (
    VIFRAG,
    Composition,
    Example,
    Instruction,
    Made,
    Query,
    Remembering,
    VerifierSet,
    aback_translate,
    accepted,
    cross_validate,
    filter_responses,
    in_sandbox,
    read_verifier,
    synthesize_verifiers,
    transformers_nli,
)

__all__ = [
    "CHECKERS",
    "VIFRAG",
    "Composition",
    "Example",
    "FollowRAG",
    "Instruction",
    "Item",
    "Made",
    "Query",
    "Remembering",
    "VerifierSet",
    "aback_translate",
    "accepted",
    "alias_match",
    "contradictory",
    "cross_validate",
    "filter_responses",
    "in_sandbox",
    "load_followrag",
    "read_rating",
    "read_verifier",
    "synthesize_verifiers",
    "transformers_nli",
]
