"""What is wrong with this machine, or with a cluster, before a GPU-hour is spent: `checks` has all of them in one
table, `machine`, `nvidia` and `software` say how each is done, `nodes` has them done on each node of a Ray cluster.

A check asks and judges. What other programs say is read by functions of their own, which take it as text.
"""
