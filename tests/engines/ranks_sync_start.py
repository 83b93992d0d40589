"""The first syncs into a server that started without weights: args as of ranks_sync.py."""

from __future__ import annotations

from ranks_sync import check_start, check_versions_change_places, run_checks

if __name__ == "__main__":
    run_checks({f.__name__: f for f in (check_start, check_versions_change_places)})
