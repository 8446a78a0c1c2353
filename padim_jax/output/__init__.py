"""Outputs of a run: tables, figures, predictions, reports."""
