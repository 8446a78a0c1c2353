"""The modes of the command line: files in, files out."""
