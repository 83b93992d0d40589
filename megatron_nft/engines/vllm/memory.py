"""vLLM's calls that release and resume memory (`--enable-sleep-mode`).

Level 2 drops weights and KV cache. Level 1 would copy the weights to the host, so for the KV cache alone vLLM 0.32 has
a call of its own, which needs a completed pause. Waking a server ends its pause as well. All of these calls wait for
requests that are still running.
"""

from __future__ import annotations

from megatron_nft.engines.sleep import MemoryCalls

MEMORY_CALLS = {
    "kv_cache": MemoryCalls(
        release=(("/pause?mode=wait", None), ("/release_kv_cache_memory", None)),
        resume=(("/wake_up?tags=kv_cache", None),),
    ),
    "all": MemoryCalls(release=(("/sleep?level=2&mode=wait", None),), resume=(("/wake_up", None),)),
}
"""rollout.server.sleep_level -> calls"""
