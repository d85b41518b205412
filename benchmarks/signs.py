"""Signs drawn a second, on one core: python benchmarks/signs.py"""

from __future__ import annotations

import time

from flux2.data.signs import TASKS, SignWorld


def rate(world: SignWorld, count: int) -> float:
    """Records a second."""
    world[0]  # the glyphs are drawn once
    begun = time.perf_counter()
    for i in range(count):
        world[i]
    return count / (time.perf_counter() - begun)


def main() -> None:
    """Prints a line for each task."""
    for task in TASKS:
        world = SignWorld(length=4000, tasks={task: 1.0})
        print(f"{task:10} {rate(world, 2000):8.0f} records/s")


if __name__ == "__main__":
    main()
