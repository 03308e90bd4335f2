"""The error budget and the cases that it is held against; users' tests may import them."""
