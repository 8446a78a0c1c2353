"""A backbone from nothing: images that the program draws, and a network taught with them."""
