"""The Triton kernels: one file for each op, with its launchers above its kernels.

Contracts, checks and autograd are in kernels/NAME.py; nothing here is called by anybody else. `configurations.py`
knows which tile sizes run where, `launch.py` what a launch needs to know of the device. Runs on Triton 3.6 to 3.8;
imported only where the triton backend is used.
"""
