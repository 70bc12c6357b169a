"""Ahead-of-time compilation of every kernel: `python -m kernels.aot`, see __main__.py.

catalogue.py lists the ops, one file for each says what is compiled of it, compiler.py compiles and judges.
"""
