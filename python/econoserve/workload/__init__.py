"""Requests to schedule: traces, arrival processes and objectives. Everything random has a seed."""
