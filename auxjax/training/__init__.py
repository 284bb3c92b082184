"""Training: the state, the step that serves every method, placement on devices, checkpoints.

Import from the modules: `auxjax.training.state`, `.step`, `.parallel`, `.checkpoint`.
This file re-exports nothing, so that `auxjax.methods` can use the state without loading the step.
"""
