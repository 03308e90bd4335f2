"""`smca demo`: the layer on two photographs, then a detector trained on digits, and a page to try one in."""
