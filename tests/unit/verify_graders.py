"""Graders by dotted path for the tests of the pool. The response says what to do; anything else is compared."""

import ctypes
import os
import signal
import sys
import time

from megatron_nft.types import Verdict


def act(response, answer, data_source, extra):
    word, _, argument = response.partition(" ")
    if word == "sleep":
        time.sleep(float(argument))
    elif word == "until":
        while not os.path.exists(argument):
            time.sleep(0.01)
    elif word == "touch":
        open(argument, "w").close()
    elif word == "spin":
        start = time.process_time()
        while time.process_time() - start < float(argument):
            pass
    elif word == "deaf":  # as C code that never looks at signals
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        while True:
            pass
    elif word == "memory":
        bytearray(int(argument))
    elif word == "segfault":
        ctypes.string_at(0)
    elif word == "exit":
        os._exit(int(argument))
    elif word == "killed_once":  # as if the kernel had chosen this worker
        if not os.path.exists(argument):
            open(argument, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return True
    elif word == "raise":
        raise KeyError("no such key")
    elif word == "modules":
        return not {"torch", "numpy", "transformers"} & set(sys.modules)
    elif word == "extra":
        return extra == {"index": 7} and data_source == "gsm8k"
    elif word == "backend":  # what mpmath computes with: python or gmpy
        from mpmath import libmp

        return argument == libmp.BACKEND
    elif word == "binomial":  # hours, in one call that never looks at signals
        import gmpy2

        gmpy2.bincoef(10**10, 5 * 10**9)
    elif word == "verdict":
        return Verdict(argument)
    elif word == "nonsense":
        return "correct"
    return response == answer


def always_right(response, answer, data_source, extra):
    return True


not_a_function = 5
