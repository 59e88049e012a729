"""CUDA source of kernels that are too long for the module that calls them."""
