"""Ops in PyTorch that are too long to stand beside their contract: what a machine without a GPU runs.

Contracts, checks and autograd are in kernels/NAME.py; nothing here is called by anybody else.
"""
