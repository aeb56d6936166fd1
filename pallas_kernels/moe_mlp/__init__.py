"""The feed-forward network of a mixture of experts: ``hidden`` and ``down``."""
