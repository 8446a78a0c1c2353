"""Fitted models and their thresholds on disk."""
