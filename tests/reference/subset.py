"""Cut the arrays of published code down to what a checkout carries: at most 300 KB.

python tests/reference/subset.py path/to/reference.npz
"""

import sys
from pathlib import Path

import numpy as np

PATTERNS = ("0.3", "0.5", "0.7", "2of4", "4of8")
ROWS = 8  # of SparseGPT's weights


def main() -> None:
    """Write pruning.npz and allocation.npz beside this file."""
    full = np.load(sys.argv[1])
    published = [key for key in full if key.startswith(("owl_", "alphapruning_"))]
    np.savez_compressed(
        Path(__file__).with_name("allocation.npz"),
        up=full["alloc_2_up"],
        **{key: full[key] for key in published},
    )
    weight, hessian = full["wide_weight"], full["wide_sparsegpt_hessian"]
    kept = {
        "weight": weight,
        "tokens": np.array(full["wide_inputs"].reshape(-1, weight.shape[1]).shape[0]),
        "scaler_row": full["wide_wanda_scaler_row"],
        "hessian_upper": hessian[np.triu_indices(len(hessian))],
    }
    for pattern in PATTERNS:
        pruned = full[f"wide_sparsegpt_weight_{pattern}"]
        kept[f"sparsegpt_mask_{pattern}"] = np.packbits(pruned == 0)
        kept[f"sparsegpt_rows_{pattern}"] = pruned[:ROWS][pruned[:ROWS] != 0]
        for method in ("wanda", "magnitude"):
            if (key := f"wide_{method}_pruned_mask_{pattern}") in full:
                kept[f"{method}_mask_{pattern}"] = np.packbits(full[key])
    np.savez_compressed(Path(__file__).with_name("pruning.npz"), **kept)


if __name__ == "__main__":
    main()
