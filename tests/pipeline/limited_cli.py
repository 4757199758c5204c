"""The command line in a process that may not write a file of more than FILE_LIMIT_BYTES, or that believes in
FREE_BYTES of free disk."""

import os
import resource
import shutil
from unittest.mock import Mock, patch

if __name__ == "__main__":
    if limit := os.environ.get("FILE_LIMIT_BYTES"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    if free := os.environ.get("FREE_BYTES"):
        patch.object(shutil, "disk_usage", return_value=Mock(free=int(free))).start()
    from shardq.cli import main

    main()
