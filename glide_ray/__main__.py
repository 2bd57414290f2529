"""`python -m glide_ray`: the command `glide`."""

import sys

from .cli.main import main

sys.exit(main())
