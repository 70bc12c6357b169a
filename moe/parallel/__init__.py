"""Ranks as a grid of data x expert, and the exchange of tokens between those that hold different experts."""

from moe.parallel.mesh import ALONE, Mesh, workers_on_each_node

__all__ = ["ALONE", "Mesh", "workers_on_each_node"]
