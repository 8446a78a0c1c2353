"""Accelerators and processes: who holds what, and what crosses the wire."""
