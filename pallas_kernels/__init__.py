"""Raw Pallas kernels of sparsejax: arrays and ints in, arrays out.

One folder per operator; in it one file per backend, all with the same signatures, and
``_spec.py``: which problems a backend takes and with which tile sizes. No autodiff, no
references, no validation of users' input: those live in ``sparsejax.ops``. Shipped by
sparsejax, without a promise that names or signatures stay.
"""
