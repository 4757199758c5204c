"""What tests of block mode share."""

from torch_threads import one_thread as one_thread
