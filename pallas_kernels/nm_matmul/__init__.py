"""Products with a condensed N:M matrix: ``product`` and ``sampled``."""
