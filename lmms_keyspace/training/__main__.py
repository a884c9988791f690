"""`python -m lmms_keyspace.training ...` is `lmms-keyspace train ...`, for launchers that start modules."""

import sys

from lmms_keyspace.cli import main

sys.argv.insert(1, "train")
main()
