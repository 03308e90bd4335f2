"""`smca cost`: the cost of the compiled kernels, without a GPU."""
