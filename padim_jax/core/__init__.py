"""The algorithm of PaDiM: pure functions of arrays, without configuration, files or devices."""
