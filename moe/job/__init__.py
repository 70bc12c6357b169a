"""One ordinary training job, from text to a measured model: read stages (what depends on what), train, measure,
results; `python -m moe.job` runs all of it in the ranks that torchrun has started.
"""
