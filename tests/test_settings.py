"""Every setting acts: the table of all arguments with a default, fields of dataclasses and options, and the test of each.

`python benchmarks/mutants.py --settings` writes it: it has the package ignore each setting in turn, and takes the first test
that fails.
"""

import json
from pathlib import Path

from mutations import EQUIVALENT, FILES, ignored_settings

TESTS = Path(__file__).parent


def test_every_setting_is_in_the_table_with_a_test_that_it_acts():
    table = json.loads((TESTS / "settings.json").read_text())
    settings = {mutant.key for file in FILES for mutant in ignored_settings(file)} - EQUIVALENT.keys()
    assert set(table) == settings, "write the test of what is new, then run `python benchmarks/mutants.py --settings`"
    for setting, test in table.items():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (TESTS.parent / file).read_text(), f"{setting}: {test}"
