"""Folders to records to uint8 batches."""
