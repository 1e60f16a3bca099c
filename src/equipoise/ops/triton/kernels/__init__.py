"""The kernels. These modules import triton, so only functions import them."""
