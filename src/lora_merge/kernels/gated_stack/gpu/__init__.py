"""Triton kernels, their launches, gradients and operators."""
