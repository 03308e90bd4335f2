"""The command `smca` and its parts; no part of the library imports them."""
