"""Where the engines of synthesis go: how many actors, and what each asks of Ray, from what the nodes offer."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cartridges.config import SynthesizeSettings


@dataclass(frozen=True)
class Placement:
    """`num_actors` at first and `most` in the end. `beside`: actors that share a node, and so its cores. `engines`: how
    many times the speed of one engine alone the first actors have, since those that share cores or wait add none."""

    num_actors: int
    most: int
    beside: int
    num_cpus: int
    num_gpus: int | None
    engines: int


def place(wanted: SynthesizeSettings, nodes: Sequence[Mapping[str, float]], gpus_each: int) -> Placement:
    """`nodes`: the resources of each, as Ray names them. An engine takes `gpus_each` GPUs where there are any.

    An actor asks for as many CPUs as it has threads, so that no two of them are put on cores that one needs; but one of
    each node's is left for reading and writing.
    """
    on_gpu = any(node.get("GPU", 0) for node in nodes)
    slots = [int(node.get("GPU", 0)) // gpus_each if on_gpu else int(node.get("CPU", 0) >= 1) for node in nodes]
    num_actors = wanted.num_actors or max(1, sum(slots))
    most = max(num_actors, wanted.max_actors)
    beside = max(slots) if on_gpu else -(-num_actors // max(1, sum(slots)))
    beside = max(1, min(beside, most))
    cpus = int(min((node.get("CPU", 1) for node, room in zip(nodes, slots, strict=True) if room), default=1))
    threads = wanted.threads_per_actor or max(1, cpus // beside)
    num_cpus = max(1, min(threads, (cpus - 1) // beside))
    return Placement(num_actors, most, beside, num_cpus, gpus_each if on_gpu else None,
                     max(1, min(num_actors, sum(slots))))


def threads_here(threads: int, beside: int) -> int:
    """Of an engine on this node: `threads`, or where that is 0 its share of the cores that this process may use."""
    return threads or max(1, len(os.sched_getaffinity(0)) // beside)
