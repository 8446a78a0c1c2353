"""The operating system: paths, locks, signals, streams, progress bars, caches."""
