"""Product with a Monarch matrix, both factors in one kernel: ``product``."""
