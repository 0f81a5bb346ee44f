"""The CPU engine side by side: upstream's attention, ours, and vLLM's CPU build.

``python -m benchmark.cpu_engine.run`` from the root of the repository.
"""
