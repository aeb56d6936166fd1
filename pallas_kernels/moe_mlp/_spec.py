"""What the mixture-of-experts kernels take, and their tiles. Pure Python on shapes.

Every backend file has the same two functions. Choices (a token sent to an expert) lie
sorted by expert: expert e has the ``sizes[e]`` choices after those of the experts
before it; choices beyond the sum are the tail.

``hidden(x, w_in, w_gate, tokens, sizes, *, activation, config, interpret)`` -> h
    x       [t, d]
    w_in    [experts, d, f]             w_gate the same or None; dtype of x
    tokens  int32 [c]                   the token of each choice, also in the tail
    sizes   int32 [experts]             traced; sum at most c
    h       [c, f]                      dtype of x

        h[i] = activation(x[tokens[i]] @ w_in[e]), or
        h[i] = activation(x[tokens[i]] @ w_gate[e]) * (x[tokens[i]] @ w_in[e])

``down(h, w_out, choices, weights, sizes, *, config, interpret)`` -> z
    h       [c, f]                      w_out [experts, f, d], dtype of h
    choices int32 [c]                   a permutation of 0 .. c - 1
    weights f32 [c]                     gate of each choice, in the sorted order
    z       [c, d]                      dtype of h

        z[choices[i]] = weights[i] * (h[i] @ w_out[e])

Products and activation in float32. Rows of the tail come out 0 in both.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts a product and picks its tiles.

    ``op`` is "moe_hidden", "moe_hidden_gated" or "moe_down"; d is the width of a
    token, f that of the hidden layer, in all three.
    """

    op: str
    tokens: int
    choices: int
    d: int
    f: int
    experts: int
    dtype: str

    def __str__(self):
        return (
            f"{self.op}: {self.choices} choices of {self.tokens} tokens, "
            f"{self.experts} experts {self.d}x{self.f}, {self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    tile_m: choices that one program instance holds.
    tile_k, tile_n: rows and columns of a matrix that it holds.
    rows: TPU: choices of a tile that go through the inner step at a time.
    vmem: TPU: bytes that the kernel may take of VMEM.
    """

    tile_m: int
    tile_k: int
    tile_n: int
    rows: int = 128
    vmem: int = 0


# --- TPU: Pallas Mosaic -------------------------------------------------------------


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------
