"""Errors, files, signals, devices, processes: what the program needs of the machine. Imports nothing else."""
