"""The Triton kernels; the files beside this folder launch them. Imported only when chosen.

    shrink       partial sums of x [down; gate rows]^T, the width cut into SPLIT pieces
    score        the same of the gate's rows alone, for many tokens
    gate         the pieces added in a fixed order, scores to weights, z = g u, and a bit per unit
    expand       y + z up, reading only the rows of `up` whose bit some token of the tile has set
    gate_expand  the last two as one, for few tokens and all modules that share the input
    grouped      route, place, shrink and expand of tokens in order of expert

No atomics, no sorting, nothing whose shape depends on data, no word from the device to the host: a
CUDA graph can hold it, and the same input gives the same bits. The number of tokens is an ordinary
argument, so no batch size compiles anew.
"""
