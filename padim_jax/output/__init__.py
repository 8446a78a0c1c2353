"""What a run leaves behind: tables, figures, predictions, reports."""
