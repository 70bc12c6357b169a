"""How the C library allocates while a CPU trains, as variables of a process's environment.

glibc gives large blocks back to the system after each use and faults them in again: a fifth of a step.
"""

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # the largest it takes
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_ARENA_MAX": "1",  # or every thread keeps what it once had: half of a rank's memory
}
