"""The scheduler's decisions: pure Python, no torch, no SGLang, no clock, no I/O.

Terms used everywhere: PT and GT are a request's prefill and generation task; KVC is the KV cache,
counted in tokens; RL is the response length in tokens; TFS is the target forward size, the tokens
of one forward pass.
"""
