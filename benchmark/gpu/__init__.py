"""EconoServe on a CUDA machine without a network: collect, install there, measure.

``prepare`` here, ``assemble.py`` and ``check`` there; see the README beside this file.
"""
