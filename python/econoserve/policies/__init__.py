"""Scheduling policies on the core's interface, one file each."""
