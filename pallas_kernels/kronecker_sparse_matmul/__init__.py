"""Products with a Kronecker-sparse factor: ``product`` and ``sampled``."""
