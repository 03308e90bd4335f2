"""`smca cost`: what the compiled kernels cost, without a GPU."""
