"""Settings: defaults, bounds, meaning, and the configuration that is made of them."""
