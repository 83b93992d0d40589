"""One of two engines dies in the middle of a sync over a group: args as of ranks_sync_lost.py."""

from ranks_sync import run_checks
from ranks_sync_lost import check_one_of_two_lost_over_a_group, check_start

if __name__ == "__main__":
    checks = (check_start, check_one_of_two_lost_over_a_group)
    run_checks({check.__name__: check for check in checks})
