"""sparsejax: sparse models in JAX."""
