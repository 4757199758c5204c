"""The command line in a process that may not write a file of more than FILE_LIMIT_BYTES."""

import os
import resource

LIMIT_BYTES = int(os.environ["FILE_LIMIT_BYTES"])

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    from shardq.cli import main

    main()
