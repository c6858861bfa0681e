"""Planning for TPU pods that are not there (`plan.py`)."""

import os

# libtpu, and jax when it is imported beside it, look for TPUs and for other processes that use them. There are none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
