"""EconoServe, stock SGLang and vLLM as servers under the same load; see ``README.md``."""
