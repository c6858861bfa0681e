"""The list of planted faults (`python tests/faults`) keeps up with the code."""

import re
from pathlib import Path

from faults.fault import PACKAGE, all_faults

ROOT = Path(__file__).parents[1]


def test_every_fault_still_has_its_place():
    faults = all_faults()
    assert len(faults) >= 80
    assert len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        text = (PACKAGE / fault.file).read_text()
        assert fault.planted(text) != text
        compile(fault.planted(text), fault.file, "exec")


def test_the_nearest_tests_of_every_fault_exist():
    for fault in all_faults():
        for name in fault.nearest():
            file, _, test = name.partition("::")
            defined = rf"^def {test}\(" if test else "^def test_"
            assert re.search(defined, (ROOT / file).read_text(), re.M), name
