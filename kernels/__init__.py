"""Triton kernels; imported as `sparse_attn.kernels`. Importing this package needs no Triton."""
