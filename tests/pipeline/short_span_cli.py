"""The command line, but range mode brings pieces of SPAN_BYTES, so that small shards have many."""

import os
from unittest.mock import patch

if __name__ == "__main__":
    for name in ("shardq.spans.SPAN_BYTES", "shardq.cut.SPAN_BYTES", "shardq.cut.SLAB_BYTES"):
        patch(name, int(os.environ["SPAN_BYTES"])).start()
    for name in ("shardq.spans.BOND_BYTES", "shardq.onepass.BOND_BYTES"):
        patch(name, 2 * int(os.environ["SPAN_BYTES"])).start()
    from shardq.cli import main

    main()
