"""`python -m regrow`, which is how `accelerate launch -m regrow` and `torchrun -m regrow` start a process.

What this gives up: nothing; it is the command.
"""

import sys

from regrow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
