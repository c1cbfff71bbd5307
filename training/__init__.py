"""Training: recipes, losses, the loop, feature caches and checkpoints.

Imports torch, `models` and the torch-free data sets, pre-processing and recall of `runtime`. Start with `loop.py`.
"""
