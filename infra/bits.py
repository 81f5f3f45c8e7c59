"""Bits per weight as a rate in [0, 1), so that lines, bounds and searches are the same for both.

    bits_of(0.5)                                        # 5.125: 8 at a rate of 0, 2.25 at 1
    with_rate({"method": "gptq", "bits": 3.0})          # and "sparsity": 0.8696

Of methods that remove nothing; 2.25 bits are what codes of 2 bits take with the scales of rows that
are not very short.
"""

from typing import Any

ROUNDING = ("rtn", "gptq")  # methods that remove nothing: they leave every weight fewer bits
MOST, LEAST = 8.0, 2.25
WIDTHS = (2, 3, 4, 8)  # bits of a code
GROUP = 128  # neighbours of a row that share a scale


def bits_of(rate: float) -> float:
    """Mean bits per weight, scales counted, at a rate of a method that only rounds."""
    return MOST - (MOST - LEAST) * rate


def with_rate(prune: Any) -> Any:
    """The contents of a section [prune] with the rate that its bits are, where it only rounds.

    Raises ValueError where they say something else as well.
    """
    if not isinstance(prune, dict):
        return prune
    method, bits, sparsity = (prune.get(key) for key in ("method", "bits", "sparsity"))
    if method not in ROUNDING:
        if prune.get("pattern") == "structured" and bits:
            raise ValueError(
                "prune.bits does not go with prune.pattern='structured': leave one out"
            )
        if isinstance(bits, int | float) and 0 < bits < LEAST:
            raise ValueError(f"prune.bits={bits:g}: codes and their scales take {LEAST:g} or more")
        return prune
    if prune.get("pattern", "unstructured") != "unstructured":
        raise ValueError(f"prune.method={method!r} removes nothing: leave prune.pattern out")
    if not isinstance(bits, int | float) or not LEAST <= bits <= MOST:
        raise ValueError(
            f"prune.method={method!r} needs prune.bits from {LEAST:g} to {MOST:g}, not {bits or 0}"
        )
    rate = (MOST - bits) / (MOST - LEAST)
    if isinstance(sparsity, int | float) and sparsity and abs(sparsity - rate) > 1e-9:
        raise ValueError(
            f"prune.method={method!r} removes nothing: leave prune.sparsity out or set it to 0, or "
            "use method='sparsegpt' with prune.bits, which prunes and rounds at once"
        )
    return prune | {"sparsity": rate}


def in_words(sparsity: float, bits: float, method: str, pattern: str) -> str:
    """What is asked: 60 % sparsity; 30 % structured sparsity; 3 bits; 50 % sparsity, 4 bits."""
    kind = "structured sparsity" if pattern == "structured" else "sparsity"
    zeros = [] if method in ROUNDING else [f"{100 * sparsity:g} % {kind}"]
    return ", ".join([*zeros, *([f"{bits:g} bits"] if bits else [])])
