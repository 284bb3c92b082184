"""Training: the state, the step that serves every method, placement on devices, large models, checkpoints.

Import from the modules: `auxjax.interface`, `.step`, `.parallel`, `.model_transforms`, `.memory`, `.checkpoint`.
This file re-exports nothing, so that `auxjax.methods` can use the state without loading the step.
"""
