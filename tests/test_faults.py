"""The list of planted faults (`python tests/faults`) keeps up with the code."""

from faults.fault import PACKAGE, all_faults


def test_every_fault_still_has_its_place():
    faults = all_faults()
    assert len(faults) >= 80
    assert len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        text = (PACKAGE / fault.file).read_text()
        assert fault.planted(text) != text
        compile(fault.planted(text), fault.file, "exec")
