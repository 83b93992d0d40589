"""SGLang's calls that release and resume memory (`--enable-memory-saver`). They name what is released by tags.

SGLang 0.5.17 kills its scheduler when it is told to release while requests run, or to resume what it has not released.
/flush_cache is refused while requests run, so it tells when the server is idle.
"""

from __future__ import annotations

from megatron_nft.engines.sleep import MemoryCalls


def _calls(*tags: str) -> MemoryCalls:
    body = {"tags": list(tags)}
    return MemoryCalls(
        release=(("/release_memory_occupation", body),),
        resume=(("/resume_memory_occupation", body),),
        refused_while_busy="/flush_cache",
    )


MEMORY_CALLS = {"kv_cache": _calls("kv_cache"), "all": _calls("kv_cache", "weights")}
"""rollout.server.sleep_level -> calls"""
