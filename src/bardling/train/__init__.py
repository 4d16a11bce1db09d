"""Training: batch arithmetic, the step, the loop, the hooks, and the run folder that they fill."""
