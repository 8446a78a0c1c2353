"""Weight files to Flax variables."""
