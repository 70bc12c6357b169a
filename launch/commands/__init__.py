"""The commands of `polyclinic` but for `train` and `report`, a file for each: what is asked for is checked, and shown.

terminal and use_options have what several of them share.
"""
