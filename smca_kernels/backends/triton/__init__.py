"""The Triton kernels and the operator made of them; importing a module from here imports Triton."""
