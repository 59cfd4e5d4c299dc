"""The console program where a version of Transformer Engine is installed, or seems to be.

python -m tests.workers.transformer_engine_cli VERSION COMMAND key=value ...
"""

import sys

from tests.transformer_engine import on_cpu

if __name__ == "__main__":
    on_cpu.install(sys.argv[1])

    from nemo_rlhf.cli import main

    sys.exit(main(sys.argv[2:]))
