"""`smca parity`: is every backend here, and what Triton compiles for other cards, as right as PyTorch itself?"""
