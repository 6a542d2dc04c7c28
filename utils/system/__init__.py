"""Errors, files, signals, devices, processes: what the machine needs. Nothing else is imported here."""
