"""What a loaded model's modules are: linear layers under PyTorch's and transformers' two names."""

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D: a linear layer whose weight lies as (in, out)."""
    return type(module).__name__ == "Conv1D"  # transformers is not imported to find out


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer, quantised or not; None of what says no such sizes."""
    for out, into in (("out_features", "in_features"), ("nf", "nx")):
        sizes = getattr(module, out, None), getattr(module, into, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    return None
