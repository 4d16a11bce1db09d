"""Complete programs built on the training code: `bench` measures a recipe's speed, `verify` checks its promises,
`scores` measures a model on text and tasks.

They assemble a run as training does (`training/resolve.py`, `training/build.py`) and return results as plain values. Printing
belongs in `cli/`; what training itself needs belongs in `training/`.
"""
