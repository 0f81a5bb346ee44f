"""What requests have in SGLang's prefix cache, as a policy asks for it.

Owns the questions; it leaves the cache as it is, but for locks that it takes and gives back.
"""

from typing import Any

from sglang.srt.managers.schedule_batch import Req

from econoserve.core.types import CachedPrefix


def cached_prefix(req: Req, cache: Any) -> CachedPrefix:
    """Match a waiting prompt, and see what pinning the match would take from free KV.

    Args:
        req: the request.
        cache: SGLang's prefix cache.

    Returns:
        What of its prompt is cached.
    """
    req.init_next_round_input(cache)
    if req.prefix_len == 0:
        return CachedPrefix()
    before = cache.evictable_size()
    lock = cache.lock(req.last_node)
    pinned = before - cache.evictable_size()
    cache.unlock(lock)
    return CachedPrefix(req.prefix_len, evictable_tokens=pinned, key=req.last_node)


def released_tokens(req: Req, cache: Any) -> int:
    """What would be free without a request: its own KVC, and the prefix that it alone pins.

    Args:
        req: the request.
        cache: SGLang's prefix cache.

    Returns:
        Tokens.
    """
    if not req.kv.holds_kv or req.session is not None:
        return 0
    before = cache.evictable_size()
    cache.unlock(req.lock)
    pinned = cache.evictable_size() - before
    if req.lock is not None:
        req.lock = cache.lock(req.lock.node)
    return req.kv.kv_allocated_len - req.kv.cache_protected_len + pinned
