"""The work on one model: allocation, pruning, the lockstep sweep, evaluation, checkpoints."""
