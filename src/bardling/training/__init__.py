"""Training: everything between a configuration and a trained checkpoint, and nothing that works without training.

A run goes straight down: `run.py` (`train`, `resume`) -> `resolve.py` (every open setting becomes a value) -> `session.py` (one
start of a run) -> `build.py` (model, optimizer, scaler, EMA, wrapped forward) -> `loop.py` -> `step.py`, which minimises an
`objective.py`. `hooks/` acts between steps and `recovery/` survives faults. `library.py` is the same loop without a run folder.

What does not belong here: batch arithmetic and schedules (`planning/`), what is saved and how (`checkpoint/`), where metrics go
(`monitor/`), and complete programs on top of a run (`tools/`).
"""
