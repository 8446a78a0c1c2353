"""Pretraining of a backbone: procedural images, and a network trained on them."""
