"""torchrun, as its command starts it, whose processes are forked like those of a test (:mod:`tests.warm_python`)."""

import subprocess
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

if __name__ == "__main__":
    subprocess_handler.Popen = subprocess.Popen  # it was imported by name
    sys.exit(run.main())
