"""Stock SGLang and EconoServe side by side: same platform, model, requests and clock.

``python -m benchmark.scheduler_comparison.run`` from the root of the repository.
"""
