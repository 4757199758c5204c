"""shardq: quantize checkpoints of any size, shard by shard, without a GPU, without model code, in constant memory.

    import shardq
    result = shardq.quantize("org/name", "W4A16", output_dir="name-W4A16", limits=shardq.Limits(parallel=4))

With more than one worker the work is done in processes; as with any use of multiprocessing, a script then calls this below
`if __name__ == "__main__":`.
"""

from shardq.api import inspect, plan, plan_headers, quantize, verify
from shardq.errors import ShardqError
from shardq.inspection import Inspection
from shardq.limits import Limits
from shardq.plan import Plan
from shardq.progress import Progress
from shardq.recipe import Recipe, make_recipe
from shardq.run import Result
from shardq.verify import Verification
from shardq.version import VERSION as __version__

__all__ = [
    "Inspection",
    "Limits",
    "Plan",
    "Progress",
    "Recipe",
    "Result",
    "ShardqError",
    "Verification",
    "__version__",
    "inspect",
    "make_recipe",
    "plan",
    "plan_headers",
    "quantize",
    "verify",
]
