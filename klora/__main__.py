"""`python -m klora` is `klora`."""

import sys

from klora.cli import main

sys.exit(main())
