"""Accelerators and processes: distribution of data, and communication."""
