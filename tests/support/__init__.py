"""What the test files share: tiny models, known laws, processes, servers and stand-ins."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent

# Before they are imported: assertions of what tests share say as much as those of tests.
pytest.register_assert_rewrite(*(f"support.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py")))
