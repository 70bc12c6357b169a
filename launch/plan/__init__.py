"""What a config would need, take and cost on a cluster you do not have yet: memory, traffic, time.

Read shape (what a model is made of), cluster and rates (what a machine can do), memory, step (where the time of an
update goes), skew (what uneven routing and slow ranks add), sweep (which mesh is best), advice (what to change), page
(how it is shown) and command. Nothing here touches a GPU or a cluster. benchmarks/published_runs.py holds it against
what others have published.
"""
