"""`python train.py key=value...` is `qvgen train key=value...`."""

import sys

from qvgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
