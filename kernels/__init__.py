"""The Triton kernels of re-attention. Importing them needs triton; nothing here is imported without it."""
