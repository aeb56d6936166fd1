"""Products of rows sorted by group, a matrix per group: ``product`` and ``sampled``."""
