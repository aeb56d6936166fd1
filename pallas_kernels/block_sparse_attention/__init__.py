"""Attention over listed blocks: ``forward``, ``backward_q`` and ``backward_kv``."""
