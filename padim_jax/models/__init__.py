"""Backbones in Flax: images to feature maps."""
