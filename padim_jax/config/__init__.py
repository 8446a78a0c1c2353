"""Settings: defaults, bounds, meaning, and the configuration made of them."""
