"""``python -m zmq_autograd``: the command line."""

import sys

from zmq_autograd.cli import main

sys.exit(main())
