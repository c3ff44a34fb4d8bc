"""An interpreter of live bytes that shares nothing with the library: MLIR parses, and its use lists say who reads what."""

from typing import Any


def interpreted_peak(text: str) -> int:
    """Plays the program operation by operation with a table of buffers; frees a buffer after the last reader in MLIR's use
    list. Arguments stay. A region runs on top of what exists where it stands. For text without calls: MLIR's inliner moves
    constants about, which changes what lives where."""
    from jax.interpreters.mlir import make_ir_context
    from jaxlib.mlir import ir

    with make_ir_context():
        module = ir.Module.parse(text)
        main = next(one for one in module.body.operations if one.attributes["sym_name"].value == "main")
        block = main.regions[0].blocks[0]
        return sum(nbytes(one) for one in block.arguments) + played(block)


def nbytes(value: Any) -> int:
    from jaxlib.mlir import ir

    kind = ir.RankedTensorType(value.type)
    size = max(int("".join(filter(str.isdigit, str(kind.element_type)))), 8) // 8
    for extent in kind.shape:
        size *= extent
    return size


def played(block: Any) -> int:
    operations = list(block.operations)
    places = {hash(one.operation): place for place, one in enumerate(operations)}

    def place_of(user: Any) -> int:
        """Where in this block the operation stands that holds the user."""
        while hash(user.operation) not in places:
            user = user.parent
        return places[hash(user.operation)]

    freed_after: dict[int, list[int]] = {}
    held = peak = 0
    for place, one in enumerate(operations):
        for result in one.results:
            last = max((place_of(use.owner) for use in result.uses), default=place)
            freed_after.setdefault(last, []).append(nbytes(result))
            held += nbytes(result)
        inner = 0
        for region in one.regions:
            for inside in region.blocks:
                inner = max(inner, sum(nbytes(value) for value in inside.arguments) + played(inside))
        peak = max(peak, held + inner)
        held -= sum(freed_after.pop(place, []))
    return peak
