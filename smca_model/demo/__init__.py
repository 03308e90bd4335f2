"""`smca demo`: the layer on two photographs, then a detector trained on digits."""
