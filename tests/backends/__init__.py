"""A package, lest its folder be on the path, where the folder triton in it would pass for an empty Triton."""
