"""``python -m nemo_rlhf`` is the console program."""

import sys

from nemo_rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
