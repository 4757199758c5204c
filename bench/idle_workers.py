"""How soon worker processes are ready, and what they take while they wait. See README.md here.

Usage: python bench/idle_workers.py [COUNT]

Workers import their caller's main script again, so this one imports what it measures inside `main`.
"""

import os
import sys
import time

LIMIT_S = 60.0


def main(count: int) -> None:
    """Start the workers, wait until all have loaded the kernels, print seconds and MB."""
    from process_tree import Memory, tree_memory

    from shardq.budget import ByteBudget
    from shardq.executors.processes import ProcessExecutor
    from shardq.run import ENTRY
    from shardq.tasks import Workplace

    def show(name: str, memory: Memory) -> None:
        print(f"{name}: {memory.pss_bytes / 1e6:.1f} MB PSS, {memory.anon_shmem_bytes / 1e6:.1f} MB anonymous + shared")

    alone = tree_memory(os.getpid())
    began_s = time.perf_counter()
    with ProcessExecutor(ENTRY, Workplace({}, ("",), True, None), count, ByteBudget(None)) as executor:
        read_end, _write_end = os.pipe()  # never readable: it makes `wait` wait, though no job is there
        while not all(worker.ready for worker in executor._workers):
            executor.wait(0.005, [read_end])
            if time.perf_counter() - began_s > LIMIT_S:
                raise RuntimeError(f"{count} workers are not ready within {LIMIT_S:g} s")
        print(f"{count} workers ready after {time.perf_counter() - began_s:.2f} s")
        together = tree_memory(os.getpid())
    show("caller alone", alone)
    show(f"caller, fork server, {count} workers", together)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
