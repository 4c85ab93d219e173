"""What every test shares."""

import os

from hypothesis import settings

# No deadlines: machines differ, and speed is the business of benchmarks/. CI tries the same examples each time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
