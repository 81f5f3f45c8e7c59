"""What pruning left of a model, in a sentence: whole units that went, or bytes of few bits.

size_in_words(result, model)
# "Gone are 18 of 90 heads or groups (self_attn.o_proj) and 8,640 of 46,080 channels (...): ..."
"""

from infra.records import ModelRecord, TrialResult


def size_in_words(result: TrialResult, model: ModelRecord) -> str:
    """Empty where the model has all its weights, in full width."""
    if result.removed:
        parts = [f"{gone:,} of {count:,} {what}" for what, (gone, count) in result.removed.items()]
        left = model.total_params - sum(matrix.zeros for matrix in result.matrices)
        return (
            f"Gone are {' and '.join(parts)}: {100 * left / model.total_params:.1f} % of "
            f"{model.total_params:,} parameters are left."
        )
    if bits := sum(matrix.bits * matrix.params for matrix in result.matrices):
        full = 32 if model.dtype == "float32" else 16
        dense = full * sum(matrix.params for matrix in result.matrices)
        return (
            f"Packed, the weights of blocks take {bits / 8e6:,.1f} MB instead of "
            f"{dense / 8e6:,.1f}; a checkpoint has them in full size until sparseramp pack is run."
        )
    return ""
