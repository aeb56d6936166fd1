"""Products with a block-sparse matrix: ``dsd`` (dense = sparse x dense), ``sdd``."""
